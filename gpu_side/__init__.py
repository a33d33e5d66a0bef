"""The untrusted side: public weights and heavy matrix products. It knows nothing of tee_side."""
