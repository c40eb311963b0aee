"""Runs a script as python would, with the models registered first."""

import importlib
import os
import sys
from types import ModuleType, TracebackType

import timm_mrla

__all__ = ['launch']


def launch(script: str, args: list[str]) -> None:
    """Run a script in this process as `python SCRIPT ARGS` would, its sys.path before timm is imported.

    `__main__`, sys.argv and sys.path[0] are the script's, so that exit codes and the workers of data loaders, forked or
    spawned, are too; a traceback begins in the script.
    """
    path = os.path.join(os.getcwd(), script)
    with open(path, 'rb') as f:
        source = f.read()
    if not getattr(sys.flags, 'safe_path', False):  # python -P has no sys.path entry for the script
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    sys.argv = [script, *args]
    importlib.reload(timm_mrla)  # now it registers

    code = None

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        while traceback and traceback.tb_frame.f_code is not code:
            traceback = traceback.tb_next
        sys.__excepthook__(kind, error.with_traceback(traceback), traceback)

    sys.excepthook = excepthook
    main = sys.modules['__main__'] = ModuleType('__main__')
    main.__file__ = path
    code = compile(source, path, 'exec')
    exec(code, main.__dict__)
