"""What all models of results have in common.

Times are seconds, sizes bytes, losses nats, unless a name says otherwise. Intervals, `low` to `high`, hold at 95 %; both ends are
None where the noise is unknown. A number that is not finite is written as null.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from xtoken_core.errors import InputError

LARGEST = 1e30
"""No time, size or loss is larger; what draws them could not."""


class Record(BaseModel):
    """A JSON object of a fixed form."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")

    def write(self, path: str | Path) -> None:
        """Writes the file that `read` reads."""
        Path(path).write_text(self.model_dump_json(indent=1), encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Reads a file that `write` wrote. Raises InputError."""
        return cls.parse(text_of(path), path)

    @classmethod
    def parse(cls, text: str, where: str | Path) -> Self:
        """The object of a JSON text; `where` names it in the InputError for another form."""
        try:
            return cls.model_validate(json.loads(text, parse_constant=lambda _: None, parse_int=_number, parse_float=_number))
        except ValidationError as e:
            first = e.errors()[0]
            raise InputError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except InputError as e:
            raise InputError(f"{where}: {e}") from None
        except (ValueError, RecursionError) as e:
            raise InputError(f"{where}: not JSON: {e}") from None


def _number(text: str) -> float:
    if abs(float(text)) > LARGEST:
        raise InputError(f"{text[:20]}: too large a number")
    return float(text) if set(text) & set(".eE") else int(text)


def text_of(path: str | Path) -> str:
    """A file's text. Raises InputError."""
    try:
        if Path(path).exists() and not Path(path).is_file():  # reading a pipe or a device may never end
            raise InputError(f"{path}: is not a file")
        return Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text: {e.reason}") from None
