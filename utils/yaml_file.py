"""Reading YAML that a user wrote: everything that PyYAML can stumble over is a ``UserError``; nothing is executed."""

from __future__ import annotations

from pathlib import Path

import yaml

from utils.errors import UserError


def read_yaml(file: Path, errors: str = "strict") -> object:
    """The content of a YAML file as plain values.

    Args:
        errors: what to do about bytes that are not UTF-8: ``strict`` refuses, ``replace`` puts a question mark.

    Raises:
        UserError: the file cannot be read or is not YAML.
    """
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8-sig", errors=errors))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not a YAML file in UTF-8 ({error.reason} at byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        place = (
            f", line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
            if error.problem_mark
            else ""
        )
        raise UserError(f"{file}{place}: is not a valid YAML file: {error.problem or error.context}") from None
    # Besides its own errors PyYAML lets through those of dates that do not exist and of nesting without end.
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise UserError(f"{file}: is not a valid YAML file: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{file}: is not a valid YAML file: it is nested too deeply") from None
