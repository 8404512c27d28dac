"""Retrieval, captioning, classification, modality-gap and fidelity metrics, and the intervals around them.

Arrays and strings in, plain numbers and per-query arrays out. Import the module that is needed:
``retrieval``, ``captioning``, ``clipscore``, ``classification``, ``answers``, ``gap``, ``fidelity``, ``intervals``.
"""
