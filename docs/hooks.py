"""What mkdocs does not do by itself: pages made of the repository's files, flags, formulas.

In a page, a line of its own:

<!-- include README.md#install -->       a section of a file, with its subsections
<!-- include README.md#any alone -->     a section without them
<!-- include README.md#any at 1 -->      its first heading becomes one of level 1
<!-- include CONTRIBUTING.md -->         a whole file
<!-- commands -->                        every command with its flags, from the parsers themselves
<!-- names -->                           every name in the API reference, with its first sentence

Links between included files lead to the pages that have them; their pictures are copied.
"""

from __future__ import annotations

import argparse
import contextlib
import posixpath
import re
import sys
import textwrap
from pathlib import Path
from unittest import mock

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from sections import INCLUDE, ROOT, section, slug

ENTRY = re.compile(r"^::: optima_fast\.(\S+)\n(?:    options: \{(.*)\})?", re.MULTILINE)
FIXED = 'fence="false" stretchy="false"'
LINK = re.compile(r"(\]\()([^)\s]+)(\))")

pages: dict[str, str] = {}  # the Markdown of each page, included files in it
homes: dict[tuple[str, str], str] = {}  # the page that has a file's heading


# -- formulas --------------------------------------------------------------------------------------


def formula(source: str, display: str) -> str:
    if r"\\" in source:
        source = rf"\begin{{align*}}{source}\end{{align*}}"
    # a norm's bars are as high as what stands beside them, not as the exponent
    made = convert(source, display=display).replace("<mo>&#x02016;", f"<mo {FIXED}>&#x02016;")
    if "\\" in made:
        raise PluginError(f"not understood in a formula: {source}")
    return f'<div class="formula">{made}</div>' if display == "block" else made


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [
        {
            "name": "math",
            "class": "math",
            "format": lambda source, *_, **__: formula(source, "block"),
        }
    ]
    config.mdx_configs.setdefault("pymdownx.inlinehilite", {})["custom_inline"] = [
        {
            "name": "math",
            "class": "math",
            "format": lambda source, *_, **__: formula(source, "inline"),
        }
    ]
    return config


# -- included files --------------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages.clear(), homes.clear()
    parts: dict[str, list[tuple[str, str]]] = {}
    for file in files.documentation_pages():
        text = Path(file.abs_src_path).read_text(encoding="utf-8")
        found = []
        for match in INCLUDE.finditer(text):
            name, anchor, *_ = match.groups()
            try:
                body, anchors = section(*match.groups())
            except ValueError as reason:
                raise PluginError(f"{file.src_uri}: {reason}") from None
            homes.update({(name, each): file.src_uri for each in anchors})
            if anchor is None:
                homes[name, ""] = file.src_uri
            found.append((name, body))
        pages[file.src_uri], parts[file.src_uri] = text, found
    for uri, found in parts.items():
        bodies = iter([linked(body, name, uri, files, config) for name, body in found])
        pages[uri] = INCLUDE.sub(lambda _, bodies=bodies: next(bodies), pages[uri])
    return files


def linked(text: str, name: str, uri: str, files: Files, config: MkDocsConfig) -> str:
    """A file's text with links as they are from the page at ``uri``."""

    def link(match: re.Match[str]) -> str:
        path, _, anchor = match[2].partition("#")
        if "://" in path:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
        if path.endswith(".md"):
            home = homes.get((path, anchor)) or homes.get((path, ""))
            if home is None:
                raise PluginError(f"{name}: {match[2]} is on no page")
        else:
            if not (ROOT / path).is_file():
                raise PluginError(f"{name}: no file {match[2]}")
            home = f"files/{path}"
            if files.get_file_from_path(home) is None:
                files.append(File.generated(config, home, abs_src_path=str(ROOT / path)))
        to = "" if home == uri else posixpath.relpath(home, posixpath.dirname(uri) or ".")
        return match[1] + to + (f"#{anchor}" if anchor else "") + match[3]

    return LINK.sub(link, text)


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    text = pages[page.file.src_uri]
    for name, made in (("commands", commands), ("names", names)):
        if f"<!-- {name} -->" in text:
            text = text.replace(f"<!-- {name} -->", made())
    return text


# -- the reference ---------------------------------------------------------------------------------


def names() -> str:
    """Each name in the reference, linked, with the first sentence of its docstring."""
    package, lines = griffe.load("optima_fast", search_paths=[ROOT]), []
    for uri, text in pages.items():
        if not uri.startswith("api/"):
            continue
        rows = [
            row(package, name)
            for name, options in ENTRY.findall(text)
            if "show_root_heading: false" not in options
        ]
        if rows:
            title = re.search(r"^# (.*)", text, re.MULTILINE)[1]
            lines.append(f"## [{title}]({uri.removeprefix('api/')})")
            lines.append("\n".join(["| | |", "|---|---|", *rows]))
    return "\n\n".join(lines)


def row(package: griffe.Module, name: str) -> str:
    found = package[name]
    found = found.final_target if found.is_alias else found
    if found.docstring is None:
        raise PluginError(f"{found.path} has no docstring")
    first = " ".join(found.docstring.value.split("\n\n")[0].split())
    plain = re.sub(r":\w+:`([^`]+)`", r"`\1`", first.replace("``", "`")).replace("|", "\\|")
    return f"| [`{found.name}`][{found.path}] | {plain} |"


# -- commands --------------------------------------------------------------------------------------


def parser(module: str, *argv: str) -> argparse.ArgumentParser:
    """The parser that a command makes, caught as it is about to print its help."""
    main = __import__(f"optima_fast.{module}", fromlist=["main"]).main
    with (
        mock.patch.object(argparse.ArgumentParser, "print_help", autospec=True) as shown,
        contextlib.suppress(SystemExit),
    ):
        main([*argv, "--help"])
    return shown.call_args.args[0]


def commands() -> str:
    sys.path.insert(0, str(ROOT))
    from optima_fast.cli import COMMANDS

    homes = {"demo": "demo.__main__", "compare": "compare.__main__"}
    made = [described(name, parser(homes.get(name, name))) for name in COMMANDS]
    made.append(described("bandit replay", parser("bandit.__main__", "replay")))
    return "\n\n".join(made)


def described(name: str, parser: argparse.ArgumentParser) -> str:
    lines = [f"## {name}", f"```sh\n{synopsis(parser)}\n```", prose(parser)]
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if not isinstance(a, argparse._HelpAction)]
        if not actions:
            continue
        if group.title not in ("positional arguments", "options"):
            title = group.title[:1].upper() + group.title[1:]
            lines.append(f"### {title} {{ #{name}-{slug(title)} }}")
        lines += [flag(name, action, parser) for action in actions]
    return "\n\n".join(lines)


def synopsis(parser: argparse.ArgumentParser) -> str:
    usage = parser.format_usage().removeprefix("usage: ")
    return textwrap.dedent(" " * len("usage: ") + usage).strip()


def prose(parser: argparse.ArgumentParser) -> str:
    text = parser.description or ""
    if parser.formatter_class is argparse.RawDescriptionHelpFormatter:
        return f"```text\n{text.strip()}\n```"
    return escaped(text[:1].upper() + text[1:])


def flag(name: str, action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    """A flag as a term with its meaning, linked as ``#train--steps``."""
    long = next((text for text in action.option_strings if text.startswith("--")), action.dest)
    value = parser._get_formatter()._format_args(action, long.lstrip("-").upper())
    meaning = parser._get_formatter()._expand_help(action)
    term, many = f"`{long} {value}`".replace(" `", "`"), value.count("|") > 2
    if not action.option_strings:
        term = f"`{value}`"
    elif many:
        term = f"`{long}`"
        meaning += "; one of " + value.replace("|", ", ")
    return f"{term} {{: #{name.replace(' ', '-')}{long} }}\n:   {escaped(meaning)}"


def escaped(text: str) -> str:
    text = re.sub(r"([\\`*_<\[{])", r"\\\1", text)
    return re.sub(r"(?<![\w-])(--[a-z][a-z-]*)", r"`\1`", text).replace("\\`\\`", "`")
