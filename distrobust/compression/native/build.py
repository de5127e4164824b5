"""The C sources beside this file as a library for this very processor, built once, on first use."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_log = logging.getLogger(__name__)
SOURCES = sorted(Path(__file__).parent.glob("*.c"))
FLAGS = ("-O3", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared")
# arguments of each function: f float*, d double*, l int64_t*, i int32_t*, b uint8_t*, p another pointer, n int64_t
SIGNATURES: dict[str, str] = {
    "accumulate": "ffffffnpifn",
    "select": "ifnnlfp",
    "clear": "fn",
    "add": "flfn",
    "remove": "fflnfn",
    "pack": "lnnb",
    "unpack": "bnnl",
    "mark": "lnb",
    "marked": "bnnl",
    "numbers": "flnffnl",
    "look_up": "llnfnf",
    "lloyd": "fdnnfnn",
    "encode": "lnnnflnffnnbnbnbf",
    "decode": "bnnnnllnnnflf",
    "seal": "bnn",
    "verify": "bnn",
}
_RETURNING = ("accumulate", "marked", "decode", "verify")  # an int64_t; the others nothing


@functools.cache
def library() -> ctypes.CDLL | None:
    """Kept in the user's cache; None, with a line in the log, where there is no compiler or building fails."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    why_not = "there is no C compiler" if compiler is None else "" if sys.byteorder == "little" else "it is big-endian"
    if compiler is not None and not why_not:
        try:
            return load(_built(compiler))
        except Exception as error:  # whatever a home, a cache or a compiler may do: training goes on without
            said = getattr(error, "stderr", None) or error
            why_not = f"building the C version failed: {' '.join(str(said).split())[-300:]}"
    _log.info("compress: the local part runs in numpy and torch here: %s", why_not)
    return None


def load(path: Path) -> ctypes.CDLL:
    """The library at `path` with its functions declared."""
    loaded = ctypes.CDLL(str(path))
    for name, letters in SIGNATURES.items():
        function = getattr(loaded, f"distrobust_{name}")
        function.argtypes = [ctypes.c_int64 if letter == "n" else ctypes.c_void_p for letter in letters]
        function.restype = ctypes.c_int64 if name in _RETURNING else None
    return loaded


def compile_to(path: Path, compiler: str, flags: list[str]) -> None:
    """Raises OSError or subprocess.SubprocessError."""
    command = [compiler, *FLAGS, *flags, *map(str, SOURCES), "-o", str(path), "-lm"]
    subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


def _built(compiler: str) -> Path:
    # the compiler's name for this processor and all it can do: a home directory may be shared by several kinds
    asked = [compiler, "-march=native", "-E", "-dM", "-x", "c", os.devnull]
    processor = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
    key = "\0".join([*(source.read_text() for source in SOURCES), processor, *FLAGS])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distrobust"
    path = cache / f"native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / "native.so"
            compile_to(made, compiler, ["-march=native"])
            os.replace(made, path)  # several processes may build at once: the last one wins, all are the same
    return path
