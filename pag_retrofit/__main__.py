"""`python -m pag_retrofit` and `accelerate launch -m pag_retrofit`."""

from __future__ import annotations

# INTERIM, removed once the core is in the tree: stand-ins so that the dense stage runs.
import importlib.util
import sys
import types
from dataclasses import dataclass


@dataclass(frozen=True)
class _Spec:
    library: str
    name: str
    arguments: dict

    def build(self):
        import segmentation_models_pytorch as smp

        return getattr(smp, self.name)(**self.arguments)

    def attach(self, model):
        pass


for _name, _items in {
    "io": ["save_file", "save_pretrained", "from_pretrained", "load_file"],
}.items():
    if importlib.util.find_spec(f"pag_retrofit.{_name}") is None:
        _module = types.ModuleType(f"pag_retrofit.{_name}")
        for _item in _items:
            setattr(_module, _item, lambda *a, **k: None)
        if _name == "io":
            _module.ModelSpec = _Spec
        sys.modules[_module.__name__] = _module

from pag_retrofit.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
