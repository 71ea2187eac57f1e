"""Run an exported artefact where there is no pbfx: `python -I bare.py kind folder`.

The tests start it in a process of its own. It reads `inputs.pt`, runs what it finds in the folder,
and writes what comes out, as `outputs.pt`.
"""

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path


class Nowhere(MetaPathFinder):
    """Keeps pbfx from being found, wherever it may be installed."""

    def find_spec(self, name, path=None, target=None):
        ours = name.partition(".")[0] in ("pbfx", "pbfx_kernels")
        return _refuse(name) if ours else None


def _refuse(name):
    raise ModuleNotFoundError(f"no {name} in this process")


def main(kind: str, folder: Path) -> None:
    import torch

    # cuDNN's default for float32 convolutions is TF32, which the float32 tolerance excludes; it is
    # the process that runs a package that decides.
    torch.backends.cudnn.allow_tf32 = False
    inputs = torch.load(folder / "inputs.pt")
    with torch.no_grad():
        if kind == "export":
            model = torch.export.load(folder / "model.pt2").module()
            outputs = [model(*given) for given in inputs]
        elif kind == "inductor":
            model = torch._inductor.aoti_load_package(str(folder / "model.pt2"))
            outputs = [model(*given) for given in inputs]
        else:
            import onnxruntime

            session = onnxruntime.InferenceSession(folder / "model.onnx")
            names = [value.name for value in session.get_inputs()]
            outputs = [
                torch.from_numpy(
                    session.run(None, {n: t.numpy() for n, t in zip(names, given, strict=True)})[0]
                )
                for given in inputs
            ]
    torch.save(outputs, folder / "outputs.pt")


if __name__ == "__main__":
    sys.meta_path.insert(0, Nowhere())
    for name in ("pbfx", "pbfx_kernels"):
        try:
            __import__(name)
        except ModuleNotFoundError:
            continue
        raise AssertionError(f"{name} is here")
    main(sys.argv[1], Path(sys.argv[2]))
    assert not any(name.partition(".")[0] in ("pbfx", "pbfx_kernels") for name in sys.modules)
