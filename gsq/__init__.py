"""2 to 4 bit language models: quantize, export, verify, measure.

Nothing is imported here: the command line starts with this file. In particular `gsq.hf`, with which
transformers loads exports, is imported by its own name, since it imports torch and all of transformers'
quantizers.
"""
