"""What every command does with its command line, and with errors."""

import argparse
import difflib
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import NoReturn

from utils.errors import NOT_WRITABLE, UserError
from utils.log import LOGGER

LONGEST_DEFAULT = 20  # letters: paths are not shown
KINDS = {"int": "whole number", "float": "number"}


def exit_code(name: str, action: Callable[[], object]) -> int:
    """Runs ``action`` and returns 0, or 1 after a ``UserError``, whose text is logged behind ``name``, or after a disk
    that takes no more; 130 after Ctrl-C."""
    try:
        action()
    except UserError as error:
        LOGGER.error(f"{name}: {error}")
        return 1
    except KeyboardInterrupt:
        LOGGER.error(f"{name}: interrupted")
        return 130
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        LOGGER.error(
            f"{name}: {error.filename or 'a result'} could not be written ({error.strerror}): make room there, or "
            "choose another place"
        )
        return 1
    return 0


class CommandHelp(argparse.RawDescriptionHelpFormatter):
    """Help for 80 columns: examples as they are written, a usage line without the flags that follow anyway, every flag
    with one word for its value, and the defaults that are short."""

    def _format_usage(self, usage, actions, groups, prefix) -> str:
        needed = [action for action in actions if action.required or not action.option_strings]
        text = super()._format_usage(usage, needed, [], prefix)
        # Without a prefix it is the beginning of a subcommand's usage that is asked for.
        return text if prefix == "" or len(needed) == len(actions) else text.replace("\n", " [flags]\n", 1)

    def _fill_text(self, text, width, indent) -> str:
        blocks = text.replace("``", "").strip().split("\n\n")
        return "\n\n".join(
            block if any(line.startswith(" ") for line in block.splitlines()) else textwrap.fill(block, width)
            for block in blocks
        )

    def _format_action_invocation(self, action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"

    def _get_default_metavar_for_optional(self, action) -> str:
        kind = action.type if isinstance(action.type, type) else str
        return {int: "N", float: "X"}.get(kind) or action.dest.upper()

    def _get_help_string(self, action) -> str:
        text, default = action.help or "", action.default
        if not isinstance(default, int | float | str) or isinstance(default, bool) or not action.option_strings:
            return text
        said = "default" in text or f"({default})" in text or text.startswith(("refused", "not read"))
        off = default in ("", argparse.SUPPRESS, -1)
        return text if said or off or not text or len(str(default)) > LONGEST_DEFAULT else f"{text} (%(default)s)"


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line that says what to write instead, without the list of all flags.

    Args:
        replaced: flags of YOLOv5 that are not here -> what takes their place.
    """

    def __init__(self, *arguments: object, replaced: Mapping[str, str] | None = None, **keywords: object) -> None:
        super().__init__(*arguments, **{"formatter_class": CommandHelp} | keywords)
        self.replaced = dict(replaced or {})

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2 and ``message``, with a hint behind every flag that is not known."""
        start, _, rest = message.partition("unrecognized arguments: ")
        if rest and not start:
            words = rest.split()
            message = "; ".join(self._hint(word) for word in words if word.startswith("-"))
            message = message or f"{words[0]} belongs to no flag"
        message = self._plain(message)
        self.exit(2, f"{self.prog}: error: {message}. All flags: {self.prog} --help\n")

    @staticmethod
    def _plain(message: str) -> str:
        """argparse's wording of a value that a flag cannot take, with the flag first."""
        message = re.sub(r"^argument (--?[^/: ]+)[^:]*: ", r"\1: ", message)
        return re.sub(r"invalid (int|float) value: ('.*')", lambda m: f"{m[2]} is no {KINDS[m[1]]}", message)

    def _hint(self, word: str) -> str:
        flag = word.partition("=")[0]
        if flag in self.replaced:
            return f"{flag} is not here: {self.replaced[flag]}"
        near = difflib.get_close_matches(flag, list(self._option_string_actions), 1)
        return f"unknown flag {flag}" + (f", did you mean {near[0]}?" if near else "")
