"""A real language model split into a prefill process and a decode process.

``python -m examples.split_llm`` starts both, sends several prompts at once, and
compares every token with the same model run whole in one process.
"""
