"""From a model and its parallelism to the transfers its KV cache needs.

``plan`` prints the nixlbench commands, ``profile`` runs them, ``kvcache`` and
``iosize`` say what the cache weighs. Pure Python: needs PyYAML and nothing of the
package that is compiled.
"""
