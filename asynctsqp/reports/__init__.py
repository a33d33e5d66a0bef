"""What was measured, and how it is shown: `--stats`, `--log-rpc`, `--trace`, `python -m asynctsqp.report`.

Nothing here takes part in an answer: it is imported where one of these is asked for.
"""
