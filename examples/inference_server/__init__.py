"""An inference server: prefill and decode behind HTTP, kvxfer in between.

``python -m examples.inference_server`` starts a prefill server, a decode server and a
proxy that speaks ``/v1/completions``, with streaming.
"""
