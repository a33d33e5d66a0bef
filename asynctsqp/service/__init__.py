"""The HTTP service: an OpenAI-compatible door to an engine, with its TLS ended in this process.

    server.py        the process: socket, TLS, signals          app.py          the routes
    options.py       its flags                                  answering.py    one request from its body to its end
    tls.py keys.py   who we are, who may ask                    connections.py  what a connection may take its time for
    body.py schemas.py parameters.py   what was asked           jobs.py         what the engine is asked for it
    forms.py logprobs.py               what is answered         api_errors.py   or why not
    admission.py attendance.py         how many, how long, and until when
    metrics.py attestation.py          what is told about it

Covered: no prompt, token or answer is in a log line, a metric or an error of these modules.
Not covered: when requests come and how long they are, which whoever watches the network sees.
"""
