"""Who somebody talks to: an enclave's evidence about itself, and how a client reads and judges it."""
