"""Makes lm-evaluation-harness know the models of this distribution's entry points.

The harness (0.4.13) has a registry of models and no way for another distribution to put one into it
before its command line looks there. krait_lm_eval.pth imports this module when Python starts; it
does nothing but wait until ``lm_eval.models`` is imported, and then registers what this
distribution's group of entry points ``lm_eval.models`` names. Nothing else is loaded before it is
asked for.
"""

# mypy: disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

import sys

# As of typing, without importing it: every start of Python passes here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_MODULE = "lm_eval.models"
_DISTRIBUTION = "krait-ssm"


def register() -> None:
    """Registers the models that are not registered yet, by the names of their entry points."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        from lm_eval.api.registry import model_registry
    except ImportError:  # of a version that is too old for krait.lm_eval
        return
    try:
        entries = distribution(_DISTRIBUTION).entry_points.select(group=_MODULE)
    except PackageNotFoundError:
        return
    for entry in entries:
        if entry.name not in model_registry:
            model_registry.register(entry.name, target=entry.value)


class _Waiting:
    """Finds lm_eval.models as everybody else does, and registers after it has run."""

    _asking = False

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != _MODULE or self._asking:
            return None
        from importlib.util import find_spec

        self._asking = True
        try:
            spec = find_spec(fullname)
        finally:
            self._asking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if _waiting in sys.meta_path:
                sys.meta_path.remove(_waiting)
            register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


_waiting = _Waiting()
sys.meta_path.insert(0, _waiting)
