"""kvxfer behind the interfaces of two inference engines, without the engines.

``vllm_interface`` and ``sglang_interface`` stand in for the engines' abstract classes:
the methods that an engine calls, written from their documentation. ``vllm_connector``
and ``sglang_backend`` implement them over :mod:`kvxfer.blocking`; ``docs/engines.md``
describes the wiring. ``pool`` is what both tests compute with and look at.
"""
