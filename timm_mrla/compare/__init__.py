"""Compares models with layer attention to their plain backbones: trains both alike, for several seeds, and reports.

This file imports nothing, because each run of train.py imports `timm_mrla.compare.train_hooks` and measures its memory.
"""
