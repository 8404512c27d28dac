"""Retrieval, captioning, classification and modality-gap metrics, and the intervals around them.

Arrays and strings in, plain numbers and per-query arrays out. Import the module that is needed:
``retrieval``, ``captioning``, ``classification``, ``gap``, ``intervals``.
"""
