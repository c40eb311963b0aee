"""Runs a script or a module as python would, with the models registered first.

`launch` runs this file as a script in a fresh interpreter, because sys.path must be the user's script's before timm is
imported. Files of this folder must not have names of the standard library: python puts the folder on sys.path first.
"""

import os
import runpy
import subprocess
import sys
from types import ModuleType, TracebackType
from typing import NoReturn

__all__ = ['launch']


def launch(*args: str) -> NoReturn:
    """Replace this process by `python SCRIPT ARGS` or `python -m MODULE ARGS`, with the models registered.

    The new interpreter gets the flags of this one. On Windows it is a child process.
    """
    # private, but multiprocessing uses it too; it leaves out -u, -i and most of -X
    flags = subprocess._args_from_interpreter_flags()
    flags += [f'-X{name}' if value is True else f'-X{name}={value}' for name, value in sys._xoptions.items()]
    flags += ['-u'] * getattr(sys.stdout, 'write_through', False) + ['-i'] * sys.flags.inspect
    command = [sys.executable, *flags, __file__, *args]
    print(end='', flush=True)  # exec drops buffered output
    if os.name == 'nt':  # exec there starts another process and does not wait for it
        sys.exit(subprocess.run(command).returncode)
    os.execv(sys.executable, command)


def _excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print a traceback without the frames of this file."""
    while traceback and traceback.tb_frame.f_globals is globals():
        traceback = traceback.tb_next
    sys.__excepthook__(kind, error.with_traceback(traceback), traceback)


def _run(script: str, *args: str) -> None:
    """Run a script with sys.path, sys.argv, `__main__` and tracebacks as under python.

    So exit codes and worker processes of data loaders, forked or spawned, are as under python too.
    """
    module, *args = args if script == '-m' else (None, *args)
    path = os.path.join(os.getcwd(), script)
    # under -P, or -I in python 3.10, sys.path has no entry for the script
    if not getattr(sys.flags, 'safe_path', sys.flags.isolated):
        sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.realpath(path))
    sys.argv = [script, *args]  # python itself has -m here until it finds the module

    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    if root not in sys.path:  # the package may be a checkout that is not installed
        sys.path.append(root)
    import timm_mrla  # noqa: F401

    sys.excepthook = _excepthook
    main = sys.modules['__main__'] = ModuleType('__main__')
    if module:
        try:
            runpy._run_module_as_main(module)  # private, but the same as python -m
        except SystemExit as e:
            if not isinstance(e.__context__, runpy._Error):
                raise
            print(f'timm-mrla: {e.__context__}', file=sys.stderr)
            sys.exit(2)
    else:
        main.__file__ = path
        with open(path, 'rb') as f:
            code = compile(f.read(), path, 'exec')
        exec(code, main.__dict__)


if __name__ == '__main__':
    _run(*sys.argv[1:])
