"""Runs the command line under `python -m timm_mrla`."""

from timm_mrla.cli import main

if __name__ == '__main__':
    main()
