"""Fields and base classes of settings sections."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_serializer, model_validator

from deltaw.errors import UserError, find_similar_files
from deltaw.settings.local_names import LocalPath

if TYPE_CHECKING:
    from typing_extensions import Self

Auto = Literal["auto"]


def setting(default: Any, description: str, when: str = "", **constraints: Any) -> Any:
    """Return a pydantic field of a settings class.

    Args:
        default: Default value.
        description: Description for ``--help``.
        when: Sentence on when to change the setting, to which value, and what that costs.
        constraints: Constraints of the value, as for a pydantic field.
    """
    return Field(default, description=description, json_schema_extra={"when": when} if when else None, **constraints)


# False while settings from outside are read, because a lookup would reveal which files exist.
_LOOKS_UP_FILES = ContextVar("looks_up_files", default=True)


@contextlib.contextmanager
def without_file_lookup() -> Iterator[None]:
    """Context in which a text is a file only if it looks like a path, whether or not the file exists."""
    token = _LOOKS_UP_FILES.set(False)
    try:
        yield
    finally:
        _LOOKS_UP_FILES.reset(token)


class TextSource(BaseModel):
    """Value of a setting: a text, or a file that contains it.

    A plain string is classified once, when the settings are loaded. Saved settings store the result explicitly, so that
    a text is never reinterpreted as a path.

    Raises:
        ValueError: if not exactly one of ``text`` and ``file`` is given.
    """

    model_config = ConfigDict(extra="forbid")

    text: str | None = None
    file: LocalPath | None = None

    @model_validator(mode="after")
    def _check_exactly_one(self) -> TextSource:
        if (self.text is None) == (self.file is None):
            raise ValueError("Input should be a text, {text: …} or {file: …}")
        return self

    @model_serializer
    def _serialize(self) -> dict[str, str]:
        return {"text": self.text} if self.text is not None else {"file": str(self.file)}

    @classmethod
    def of(cls, value: str) -> TextSource | None:
        """Parse a plain string.

        Return a file source if it names an existing file or looks like a path, otherwise a text source. Return None if
        it is blank.
        """
        if not value.strip():
            return None
        could_be_path = "\n" not in value and len(value) <= 1024
        looks_like_path = could_be_path and _FILE_NAME.fullmatch(value) is not None
        exists = could_be_path and _LOOKS_UP_FILES.get() and Path(os.path.expanduser(value)).is_file()
        is_file = looks_like_path or exists
        return cls(file=value) if is_file else cls(text=value)

    def read(self, location: str) -> str:
        """Return the text without leading and trailing white space.

        Raises:
            UserError: if the file cannot be read or is empty.
        """
        if self.file is None:
            return (self.text or "").strip()
        path = Path(os.path.expanduser(self.file))
        try:
            content = path.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            similar_files = ", ".join(find_similar_files(path, lambda file: file.suffix == path.suffix)[:3])
            hint = f"did you mean: {similar_files}?" if similar_files else "write {text: …}, or give a UTF-8 file"
            raise UserError(f"the text cannot be read: {error}", location=f"{location}: {path}", hint=hint) from error
        if not content:
            raise UserError("the file is empty", location=f"{location}: {path}", hint="write the text into it")
        return content


_FILE_NAME = re.compile(r"\S+\.(?:txt|md|jinja|json|text)|(?:~|\.{1,2})?/\S+/\S*|(?:~|\.{1,2})/\S+")
_SINGLE_STRING = {"minProperties": 1, "maxProperties": 1, "additionalProperties": {"type": "string"}}
_TEXT_OR_FILE_SCHEMA = {"type": "object", "propertyNames": {"enum": ["text", "file"]}, **_SINGLE_STRING}

# Annotation of a setting that is a text or a file.
TextOrFile = Annotated[
    TextSource | None,
    BeforeValidator(lambda given: TextSource.of(given) if isinstance(given, str) else given),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXT_OR_FILE_SCHEMA, {"type": "null"}]}),
]


class TaskSettings(BaseModel):
    """Base class of the settings section of a task.

    Attributes:
        code_keys: Keys whose values name code that runs during training and evaluation.
        training_keys: Keys whose values only training uses, and which may refer to files or models.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    code_keys: ClassVar[tuple[str, ...]] = ()
    training_keys: ClassVar[tuple[str, ...]] = ()

    def check_run(self, config: Any) -> None:
        """Reject a run whose settings do not fit this section.

        Args:
            config: All settings of the run, a :class:`deltaw.settings.config.RunConfig`.

        Raises:
            UserError: if a required setting is missing, or settings contradict each other.
        """

    def external_references(self) -> Mapping[str, object]:
        """Return the values that refer to models, files, code and services outside the run's folder, by key."""
        return {}

    def for_inference(self) -> Self:
        """Return the section without the references that only training uses."""
        return self

    @classmethod
    def from_layout(cls, layout: Any) -> Self | None:
        """Return the settings of a model folder in another tool's format, or None to use the defaults.

        Args:
            layout: A :class:`deltaw.hub.sentence_layout.SentenceLayout`.
        """
        return None


def require_range(bounds: tuple[float, float], location: str) -> None:
    """Raise a UserError if the lower bound is not below the upper one."""
    if bounds[0] >= bounds[1]:
        raise UserError("the range is empty", location=location, hint=f"write {location}: [0, 1]")
