"""Runs a script or a module as python would, with the models registered first.

`launch` starts this file by its path in a fresh interpreter: timm is imported there only once sys.path is the script's.
"""

import os
import runpy
import subprocess
import sys
from types import ModuleType, TracebackType
from typing import NoReturn

__all__ = ['launch']


def launch(*args: str) -> NoReturn:
    """Go on as `python SCRIPT ARGS` or `python -m MODULE ARGS`, the models registered, under this interpreter's flags.

    On POSIX the process stays the same one.
    """
    # private, but what multiprocessing starts its workers with; it leaves out -u, -i and most of -X
    flags = subprocess._args_from_interpreter_flags()
    flags += [f'-X{name}' if value is True else f'-X{name}={value}' for name, value in sys._xoptions.items()]
    flags += ['-u'] * getattr(sys.stdout, 'write_through', False) + ['-i'] * sys.flags.inspect
    command = [sys.executable, *flags, __file__, *args]
    print(end='', flush=True)  # exec drops what is buffered
    if os.name == 'nt':  # its exec is another process, which no one waits for
        sys.exit(subprocess.run(command).returncode)
    os.execv(sys.executable, command)


def _excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print a traceback without the frames of this file."""
    while traceback and traceback.tb_frame.f_globals is globals():
        traceback = traceback.tb_next
    sys.__excepthook__(kind, error.with_traceback(traceback), traceback)


def _run(script: str, *args: str) -> None:
    """Run the arguments of `launch` with sys.path, sys.argv, `__main__` and tracebacks as python has them.

    Exit codes and the workers of data loaders, forked or spawned, then are python's too.
    """
    module, *args = args if script == '-m' else (None, *args)
    path = os.path.join(os.getcwd(), script)
    # python -P, and -I before there was -P, has no sys.path entry for the script
    if not getattr(sys.flags, 'safe_path', sys.flags.isolated):
        sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.realpath(path))
    sys.argv = [script, *args]  # python has -m here until the module is found

    root = os.path.dirname(os.path.dirname(__file__))
    if root not in sys.path:  # a checkout that is not installed
        sys.path.append(root)
    import timm_mrla  # noqa: F401

    sys.excepthook = _excepthook
    main = sys.modules['__main__'] = ModuleType('__main__')
    if module:
        try:
            runpy._run_module_as_main(module)  # private, but all that python -m does
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
