"""Text files decoded strictly: a byte that does not decode is an error with its file, its line and the fix."""

from __future__ import annotations

import codecs
from pathlib import Path

from peftkern.errors import ConfigError, DataError, near

CESU8 = "cesu-8"
"""UTF-8 in which characters beyond U+FFFF are written as two encoded surrogates, as some JSON dumps have them."""

_COMMON = ("utf-8", CESU8, "utf-16", "gb18030", "big5", "shift_jis", "cp1252", "latin-1")


def check_encoding(encoding: str) -> str:
    """Return `encoding` when Python (or this module) knows it; ConfigError with near names otherwise."""
    if encoding.lower() == CESU8:
        return CESU8
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise ConfigError(f"encoding: {encoding!r} is not a known text encoding{near(encoding, _COMMON)}") from None
    return encoding


def decode(raw: bytes, encoding: str) -> str:
    """`raw` as text; a leading byte-order mark of UTF-8 is dropped. Raises UnicodeDecodeError."""
    if encoding.lower() == CESU8:
        # Paired surrogates become the character they stand for; a lone one fails in the second step.
        return raw.decode("utf-8", "surrogatepass").encode("utf-16", "surrogatepass").decode("utf-16")
    if codecs.lookup(encoding).name == "utf-8":
        encoding = "utf-8-sig"
    return raw.decode(encoding)


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The whole file as text.

    Raises DataError when it is missing, empty (nothing but white space) or not in `encoding`; the last names the
    line, the byte and an encoding that does fit.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        text = decode(raw, check_encoding(encoding))
    except UnicodeDecodeError as error:
        raise DataError(_wrong_encoding(path, raw, encoding, error)) from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return text


def read_lines(path: Path, encoding: str = "utf-8") -> list[str]:
    """The lines of the file without their ends; only newline, carriage return or both end a line."""
    text = read_text(path, encoding).replace("\r\n", "\n").replace("\r", "\n")
    return text.removesuffix("\n").split("\n")


def _wrong_encoding(path: Path, raw: bytes, encoding: str, error: UnicodeDecodeError) -> str:
    line = raw.count(b"\n", 0, error.start) + 1
    fits = [name for name in _COMMON if name != encoding and _decodes(raw, name)]
    if raw[:2] not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) and "utf-16" in fits:
        fits.remove("utf-16")  # without its mark any even number of bytes is
    which = "" if len(fits) == 1 else ", or another of these, whichever reads right"
    fix = "; set `encoding` to what the file is in"
    if fits:
        fix = f"; it does decode as {', '.join(fits)}: set encoding={fits[0]}{which}"
    if encoding.lower() == CESU8:  # the failing byte is counted in the UTF-16 that lies between
        return f"{path}: not valid {encoding}{fix}"
    byte = error.object[error.start]
    return f"{path}, line {line}: byte 0x{byte:02x} is not valid {encoding}{fix}"


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        decode(raw, encoding)
    except UnicodeError:
        return False
    return True
