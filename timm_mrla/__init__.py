"""Models with layer attention (MRLA) for timm. Importing this package registers them and does nothing else."""

import sys
from pathlib import Path

__version__ = '0.1.0'

# The command line imports timm only when it has put the folder of the script that it runs on sys.path, as plain python
# would have: until then `python -m timm_mrla` and `timm-mrla` leave it alone.
_by_module = sys.argv[:1] == ['-m'] and ('-m', 'timm_mrla') in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
_by_command = bool(sys.argv) and Path(sys.argv[0]).stem == 'timm-mrla'
if not (_by_module or _by_command):
    from timm_mrla import models
    from timm_mrla.attention import feature_maps, layer_attention

    __all__ = ['feature_maps', 'layer_attention', 'models']
