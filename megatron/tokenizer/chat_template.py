"""Jinja chat templates, rendered byte for byte as `transformers.apply_chat_template` renders them.

The environment is that of `transformers`: a sandbox, `tojson` that leaves non-ASCII letters alone, `raise_exception`,
`strftime_now`, `{% generation %}` blocks, loop controls. Null fields of turns are removed, reasoning is available under
both of its names, and one of several named templates is chosen as in `transformers`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.conversation import ChatError

TEMPLATE_FOLDER = Path(__file__).with_name("chat_templates")
GENERATED = ("\ue0fe", "\ue0ff")  # markers around the output of {% generation %} blocks, used to locate it
_REASONING = ("reasoning_content", "thinking", "reasoning")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CONFIG, _SINGLE, _NAMED = "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"


class GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}`: the assistant's text. Leaves no trace in the output, unless `mark` is set."""

    tags = {"generation"}
    mark = False

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Any) -> str:
        text = caller()
        return f"{GENERATED[0]}{text}{GENERATED[1]}" if self.mark else text


class SafeNamespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


class DictMaker:
    """`dict(...)` and `dict.fromkeys(...)`, and nothing else of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}, which begins with an underscore")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": DictMaker(),
        "namespace": SafeNamespace,
    }
    return environment


class ChatTemplate:
    """One template, or several by name of which `default` and `tool_use` (for conversations with tools) are used."""

    def __init__(self, source: str | Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are variables such as `bos_token`. Raises ChatError for invalid Jinja."""
        self.sources = {"default": source} if isinstance(source, str) else dict(source)
        self.named = not isinstance(source, str)
        self.special_tokens = dict(special_tokens)
        self._environment = _environment()
        self._compiled: dict[str, jinja2.Template] = {}
        for name, text in self.sources.items():
            try:
                self._compiled[name] = self._environment.from_string(text)
            except (jinja2.TemplateError, RecursionError, ValueError) as error:
                raise ChatError(f"the chat template is not valid Jinja: {error}", "template") from error

    @property
    def identity(self) -> str:
        """Hash of the text."""
        text = self.sources["default"] if not self.named else json.dumps(self.sources, sort_keys=True)
        return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def choose(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        """Name of the template for a conversation with or without tools."""
        if tools is not None and "tool_use" in self.sources and self.named:
            return "tool_use"
        if "default" in self.sources:
            return "default"
        raise ChatError(
            f"several chat templates and none of them is called default: {', '.join(sorted(self.sources))}", "template"
        )

    def has_generation_blocks(self, tools: Sequence[Mapping[str, Any]] | None) -> bool:
        return _GENERATION.search(self.sources[self.choose(tools)]) is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        *,
        prompt: bool = False,
        mark: bool = False,
        name: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text; `prompt` adds the generation prompt, `mark` puts `GENERATED` around the output of
        generation blocks. Raises ChatError where the template (or `transformers`) refuses."""
        if not messages:
            raise ChatError("the conversation is empty", "empty")
        if not all(isinstance(item, Mapping) for item in (*messages, *(tools or ()), *(documents or ()))):
            raise ChatError("a turn, a tool or a document is not an object", "not an object")
        template = self._compiled[name or self.choose(tools)]
        extension = self._environment.extensions[GenerationBlocks.identifier]
        assert isinstance(extension, GenerationBlocks)
        extension.mark = mark
        try:
            return template.render(
                **{**self.special_tokens, **(arguments or {})},
                messages=[_as_seen(message) for message in messages],
                tools=tools,
                documents=documents,
                add_generation_prompt=prompt,
            )
        except Exception as error:  # a template is a program: any exception means that it refuses the conversation
            reason = str(error) or type(error).__name__
            raise ChatError(f"the chat template refuses the conversation: {reason}", "template refuses") from error
        finally:
            extension.mark = False


def _as_seen(message: Mapping[str, Any]) -> dict[str, Any]:
    """A turn without null fields; reasoning, under whichever name it comes, as `reasoning_content` and `thinking`."""
    seen = {key: value for key, value in message.items() if value is not None}
    reasoning = next((seen[name] for name in _REASONING if name in seen), None)
    return seen if reasoning is None else {"thinking": reasoning, **seen, "reasoning_content": reasoning}


def shipped_templates() -> list[str]:
    """Names of the templates that come with this project."""
    return sorted(path.stem for path in TEMPLATE_FOLDER.glob("*.jinja"))


def load_chat_template(given: str, tokenizer: Tokenizer) -> ChatTemplate:
    """The template of a model folder, of a tokenizer_config.json, in a Jinja file, or a built-in one by name.

    The special tokens are those of the tokenizer_config.json in the same folder or next to the vocabulary; without one
    the vocabulary's own begin-of-text and end-of-document tokens. Raises ChatError.
    """
    path = Path(given)
    if given in shipped_templates():
        return ChatTemplate(
            _text(TEMPLATE_FOLDER / f"{given}.jinja"), special_tokens_of(tokenizer.path.parent, tokenizer)
        )
    if not path.exists():
        raise ChatError(
            f"--chat-template {given}: no such file; give a model folder, a tokenizer_config.json, a Jinja file, or "
            f"one of {', '.join(shipped_templates())}",
            "template",
        )
    folder = path if path.is_dir() else path.parent
    source: str | dict[str, str] | None
    if path.is_dir():
        source = _of_folder(path)
    elif path.suffix == ".json":
        source = _of_config(path)
    else:
        source = _text(path)
    if source is None:
        raise ChatError(f"{given}: no chat_template in it; give a file or folder that has one", "template")
    beside = folder if (folder / _CONFIG).is_file() else tokenizer.path.parent
    return ChatTemplate(source, special_tokens_of(beside, tokenizer))


def special_tokens_of(folder: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """Variables such as `bos_token` and `eos_token`, from a tokenizer_config.json or else from the vocabulary."""
    if (folder / _CONFIG).is_file():
        config = _json(folder / _CONFIG)
        extra = config.get("extra_special_tokens")
        named = {**config, **(extra if isinstance(extra, dict) else {})}
        found = {key: _token(value) for key, value in named.items() if key.endswith("_token")}
        return {key: value for key, value in found.items() if value is not None}
    names = {index: name for name, index in tokenizer.special_tokens.items()}
    bos = {} if tokenizer.bos is None else {"bos_token": names[tokenizer.bos]}
    return {**bos, "eos_token": names[tokenizer.eod]}


def _token(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _of_folder(folder: Path) -> str | dict[str, str] | None:
    """Separate files take precedence over an entry of tokenizer_config.json, as in `transformers`."""
    named = {path.stem: _text(path) for path in sorted((folder / _NAMED).glob("*.jinja"))}
    if (folder / _SINGLE).is_file():
        single = _text(folder / _SINGLE)
        return {"default": single, **named} if named else single
    if named:
        return named
    return _of_config(folder / _CONFIG) if (folder / _CONFIG).is_file() else None


def _of_config(path: Path) -> str | dict[str, str] | None:
    content = _json(path).get("chat_template")
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(entry, dict) for entry in content):
        content = {entry.get("name"): entry.get("template") for entry in content}
    if isinstance(content, dict) and all(isinstance(text, str) for pair in content.items() for text in pair):
        return content
    raise ChatError(
        f"{path}: chat_template is neither a text nor a list of templates with name and template", "template"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ChatError(f"{path}: not JSON: {error}", "template") from error
    if not isinstance(content, dict):
        raise ChatError(f"{path}: expected a JSON object, got {type(content).__name__}", "template")
    return content


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ChatError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})", "template") from error
    except OSError as error:
        raise ChatError(f"{path}: {error.strerror}", "template") from error
