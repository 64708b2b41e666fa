"""Every name of interface.txt is there, with its parameters and defaults."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import types
from pathlib import Path
from typing import Any, Iterator

import pytest

TABLE = Path(__file__).with_name("interface.txt")


def entries() -> Iterator[tuple[str, str, str]]:
    """(module, class or nothing, line)."""
    module = owner = ""
    for line in TABLE.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            module, owner = line[1:-1].removesuffix(".py").replace("/", "."), ""
        elif line.startswith("class "):
            owner = line.removeprefix("class ").split("(")[0]
            yield module, "", line
        elif line.startswith("  "):
            yield module, owner, line.strip()
        else:
            owner = ""
            yield module, "", line


def parameters(line: str) -> list[tuple[str, str]]:
    """(name, default) of each parameter of ``name(...)``, stars included in the name."""
    name = line.split("(")[0]
    function = ast.parse(f"def {line.replace(name, 'f', 1)}: pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    positional = [a.arg for a in arguments.args]
    defaults = [eval(ast.unparse(d), {"float": float}) for d in arguments.defaults]
    texts = ["required"] * (len(positional) - len(defaults)) + [repr(d) for d in defaults]
    found = list(zip(positional, texts))
    if arguments.vararg:
        found.append((f"*{arguments.vararg.arg}", "required"))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults):
        assert default is not None
        found.append((argument.arg, repr(eval(ast.unparse(default), {"float": float}))))
    if arguments.kwarg:
        found.append((f"**{arguments.kwarg.arg}", "required"))
    return found


def actual_parameters(function: Any) -> list[tuple[str, str]]:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}

    def default(value: Any) -> str:
        if value is inspect.Parameter.empty:
            return "required"
        # Lambdas and functions by name, since their addresses differ.
        return repr(value)

    return [
        (stars.get(p.kind, "") + p.name, default(p.default))
        for p in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize("module, owner, line", list(entries()))
def test_name(module: str, owner: str, line: str) -> None:
    target: Any = importlib.import_module(module)
    if owner:
        target = getattr(target, owner)
    if line.startswith("class "):
        name = line.removeprefix("class ").split("(")[0]
        assert inspect.isclass(getattr(target, name))
        return
    head = line.split("(")[0]
    if ":" in head:
        check_field(target, line)
        return
    function = inspect.getattr_static(target, head)
    if owner and isinstance(function, classmethod):
        function = function.__func__
    assert isinstance(function, types.FunctionType), "wrapped objects hide their signature"
    quoted = line.replace("F.silu", "'F.silu'").replace("=nn.LayerNorm", "='nn.LayerNorm'")
    expected = parameters(quoted)
    found = actual_parameters(function)
    if head == "__init__" and owner == "GatedMLP":
        silu = importlib.import_module("torch.nn.functional").silu
        found = [(n, repr("F.silu") if d == repr(silu) else d) for n, d in found]
    if head == "__init__" and owner == "Block":
        layer_norm = importlib.import_module("torch.nn").LayerNorm
        found = [(n, "nn.LayerNorm" if d == repr(layer_norm) else d) for n, d in found]
        expected = [(n, d.strip("'")) for n, d in expected]
    # Keyword arguments of our own may come after upstream's in a method.
    if owner:
        ours = {"**kwargs"} | {
            n for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY
        }
        ours -= {n for n, _ in expected}
        found = [(n, d) for n, d in found if n not in ours]
    assert found == expected


def check_field(owner: Any, line: str) -> None:
    """A field of a dataclass: ``name: type = default``."""
    name, rest = line.split(":", 1)
    field = {f.name: f for f in dataclasses.fields(owner)}[name]
    if "=" not in rest:
        assert field.default is dataclasses.MISSING
        assert field.default_factory is dataclasses.MISSING
    elif "default_factory" in rest:
        kind = rest.split("default_factory=")[1].rstrip(")")
        assert field.default_factory is {"dict": dict, "list": list}[kind]
    else:
        assert repr(field.default) == rest.split("=", 1)[1].strip()


def test_table_is_read() -> None:
    assert len(list(entries())) > 150


def test_convenient_names() -> None:
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
    from mamba_ssm import (
        Mamba,
        Mamba2,
        MambaLMHeadModel,
        mamba_inner_fn,
        selective_scan_fn,
    )

    functions = (causal_conv1d_fn, causal_conv1d_update, mamba_inner_fn, selective_scan_fn)
    assert all(isinstance(f, types.FunctionType) for f in functions)
    assert all(inspect.isclass(c) for c in (Mamba, Mamba2, MambaLMHeadModel))


def test_versions() -> None:
    import causal_conv1d
    import mamba_ssm
    from packaging.version import Version

    assert mamba_ssm.__version__ == "2.3.2+krait"
    assert causal_conv1d.__version__ == "1.7.0+krait"
    assert Version(mamba_ssm.__version__) >= Version("2.3.2")
    assert Version(causal_conv1d.__version__) >= Version("1.7.0")


def test_mamba3_says_what_is_missing() -> None:
    with pytest.raises(ImportError, match="Mamba3 and its kernels are not part of"):
        from mamba_ssm import Mamba3  # noqa: F401
    with pytest.raises(ImportError, match="Mamba3 and its kernels are not part of"):
        import mamba_ssm.modules.mamba3  # noqa: F401
    import mamba_ssm

    assert not hasattr(mamba_ssm, "no_such_name")
