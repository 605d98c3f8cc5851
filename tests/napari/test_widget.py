"""The widget: its manifest, its choices, the layers that it adds, the preview, and how work is cancelled."""

from __future__ import annotations

import importlib
import math
import threading
import time
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lsconv
from lsconv.napari.problem import Problem, Restored, Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import npe2
    from napari.layers import Image, Labels

    from lsconv.napari.widget import _DELAY, RestoreWidget

pytestmark = [pytest.mark.napari, pytest.mark.filterwarnings("ignore")]


def counts(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(20, 200, shape).astype(np.uint16)


@pytest.fixture
def widget(viewer: SimpleNamespace, qtbot: Any) -> RestoreWidget:
    made = RestoreWidget(viewer)
    qtbot.addWidget(made.native)
    return made


@pytest.fixture
def done(qtbot: Any) -> Callable[[RestoreWidget], None]:
    """Wait until a widget's thread has ended, and what follows from it is done."""

    def wait(widget: RestoreWidget) -> None:
        qtbot.waitUntil(lambda: widget.worker is None and widget._wanted is None, timeout=60000)

    return wait


def test_the_manifest_is_valid_and_its_commands_exist() -> None:
    (entry,) = entry_points(group="napari.manifest", name="lsconv")
    assert entry.value == "lsconv.napari:napari.yaml"
    manifest = npe2.PluginManifest.from_file(str(files("lsconv.napari").joinpath("napari.yaml")))
    assert manifest.name == "lsconv"
    commands = {command.id: str(command.python_name) for command in manifest.contributions.commands}
    offered = [*manifest.contributions.widgets, *manifest.contributions.sample_data]
    assert {each.command for each in offered} == set(commands)
    for name in commands.values():
        module, _, attribute = name.partition(":")
        assert callable(getattr(importlib.import_module(module), attribute))


def test_the_sample_opens_as_layers_and_is_restored(
    viewer: SimpleNamespace, widget: RestoreWidget, done: Callable[[RestoreWidget], None]
) -> None:
    from lsconv.napari.samples import blurred_astronaut

    image, psf = (viewer.model.add_image(data, **about) for data, about, _ in blurred_astronaut())
    widget.image.value, widget.blur.value, widget.psf.value = image, "a layer", psf
    widget.restore()
    done(widget)
    restored = viewer.layers["blurred astronaut restored"]
    assert restored.rgb
    expected = lsconv.deconvolve(image.data.astype(np.float32), psf.data, channels="last").x.clip(0, 255)
    assert np.abs(restored.data.astype(float) - expected).max() <= 1
    assert widget.status.value.startswith("damp ")
    titles = [axes.get_title() for axes in viewer.window.docked["lsconv report"].figure.axes]
    assert "choice of damp by gcv" in titles


def test_only_the_numbers_that_a_choice_needs_are_shown(widget: RestoreWidget) -> None:
    widget.show()

    def shown() -> set[str]:
        named = ("psf", "size", "angle", "depth", "gain", "strength", "live", "error_bars")
        return {name for name in named if getattr(widget, name).visible}

    assert shown() == {"size", "depth", "error_bars"}
    widget.blur.value, widget.noise.value = "motion", "poisson"
    assert shown() == {"size", "angle", "gain"}
    assert widget.size.label == "length"
    widget.blur.value, widget.noise.value, widget.automatic.value = "a layer", "gaussian", False
    assert shown() == {"psf", "strength", "live", "error_bars"}
    widget.prior.value = "tv"
    assert shown() == {"psf", "strength", "live"}
    assert widget.strength.label == "log10 weight"


def test_layers_are_offered_as_they_come_and_go(viewer: SimpleNamespace, widget: RestoreWidget) -> None:
    assert widget.image.value is None
    widget.restore()
    assert widget.status.value == "image: open one first"
    image = viewer.model.add_image(counts(8, 8))
    mask = viewer.model.add_labels(np.zeros((8, 8), int))
    assert widget.image.choices == (image,)
    assert widget.mask.choices == (None, mask)
    widget.blur.value = "a layer"
    widget.restore()
    assert widget.status.value == "PSF layer: choose one"
    viewer.layers.clear()
    assert widget.image.value is None


def test_the_answer_lies_and_looks_like_the_image(
    viewer: SimpleNamespace, widget: RestoreWidget, done: Callable[[RestoreWidget], None]
) -> None:
    data = counts(2, 3, 20, 22)
    image = viewer.model.add_image(
        data, name="cells", scale=(60, 2, 0.25, 0.5), translate=(0, 1, 2, 3), units=("s", "um", "um", "um"),
        axis_labels=("t", "z", "y", "x"), colormap="green", contrast_limits=(10, 90), gamma=0.7, blending="additive",
        metadata={"stain": "GFP"}, rotate=None,
    )  # fmt: skip
    mask = np.zeros((20, 22), int)
    mask[3, 4] = 1
    labels = viewer.model.add_labels(mask)
    widget.image.value, widget.mask.value, widget.size.value, widget.error_bars.value = image, labels, 1.0, True
    widget.automatic.value, widget.live.value, widget.strength.value = False, False, math.log10(0.2)
    widget.restore()
    done(widget)
    assert widget.progress.value == widget.progress.max == 6
    assert widget.status.value.startswith("damp 0.2\n")
    restored, deviations = viewer.layers["cells restored"], viewer.layers["cells standard deviation"]
    expected = lsconv.deconvolve(data, lsconv.psf.gaussian(1.0).numpy(), damp=0.2, observed=mask == 0, ndim=2).x
    assert restored.data.dtype == np.uint16
    assert np.abs(restored.data.astype(int) - expected).max() <= 1
    for layer in (restored, deviations):
        assert type(layer) is Image
        for name in ("scale", "translate", "units", "axis_labels", "gamma", "blending"):
            assert np.array_equal(getattr(layer, name), getattr(image, name)), name
        assert layer.metadata["stain"] == "GFP"
        assert layer.metadata["lsconv"]["damp"] == pytest.approx([0.2] * 6)
        assert layer.metadata["lsconv"]["prior"] == "gradient"
    assert restored.colormap.name == "green"
    assert restored.contrast_limits == [10, 90]
    assert deviations.data.shape == data.shape
    assert image.metadata == {"stain": "GFP"}
    assert viewer.window.docked["lsconv report"].figure.get_suptitle().startswith("cells: damp 0.2.")


def test_the_highest_of_several_levels_is_restored(
    viewer: SimpleNamespace, widget: RestoreWidget, done: Callable[[RestoreWidget], None]
) -> None:
    data = counts(40, 44)
    image = viewer.model.add_image([data, data[::2, ::2]], multiscale=True, scale=(0.5, 0.5))
    widget.image.value = image
    widget.restore()
    done(widget)
    restored = viewer.layers[-1]
    assert restored.data.shape == (40, 44)
    assert not restored.multiscale
    assert np.array_equal(restored.scale, [0.5, 0.5])


def test_cancelling_ends_the_work_with_the_field_at_hand(
    viewer: SimpleNamespace,
    widget: RestoreWidget,
    done: Callable[[RestoreWidget], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    viewer.model.add_image(counts(4, 20, 22))
    whole, seen = Problem.restore, []

    def restore(problem: Problem, index: Any, cancelled: Callable[[], bool]) -> Restored:
        assert widget.cancel.enabled
        assert not widget.button.enabled
        seen.append(index)
        if len(seen) == 2:
            widget._cancelled.set()  # as the button does, which lives in another thread
        return whole(problem, index, cancelled)

    monkeypatch.setattr(Problem, "restore", restore)
    widget.restore()
    done(widget)
    assert len(seen) == 2
    assert widget.status.value == "cancelled"
    assert len(viewer.layers) == 1
    assert widget.button.enabled
    assert not widget.cancel.enabled


def test_cancelling_ends_the_work_within_one_field(
    viewer: SimpleNamespace, widget: RestoreWidget, done: Callable[[RestoreWidget], None], qtbot: Any
) -> None:
    viewer.model.add_image(counts(1600, 1600))
    widget.size.value = 3.0
    widget.restore()
    qtbot.wait(700)
    assert widget.worker is not None
    before = time.perf_counter()
    widget.cancel.changed.emit(True)
    assert widget.status.value == "cancelling"
    done(widget)
    assert time.perf_counter() - before < 2
    assert widget.status.value == "cancelled"
    assert len(viewer.layers) == 1


def test_the_button_asks_the_thread_to_end(
    viewer: SimpleNamespace, widget: RestoreWidget, done: Callable[[RestoreWidget], None]
) -> None:
    viewer.model.add_image(counts(30, 20, 22))
    widget.button.changed.emit(True)
    assert widget.worker is not None
    worker = widget.worker
    widget.button.changed.emit(True)
    assert widget.worker is worker  # one at a time
    widget.cancel.changed.emit(True)
    done(widget)
    assert widget.status.value == "cancelled"
    assert len(viewer.layers) == 1


def test_an_error_of_the_solver_is_shown_and_the_widget_goes_on(
    viewer: SimpleNamespace, widget: RestoreWidget, done: Callable[[RestoreWidget], None]
) -> None:
    widget.image.value = viewer.model.add_image(np.full((20, 22), np.nan, np.float32), contrast_limits=(0, 1))
    widget.restore()
    done(widget)
    assert "image" in widget.status.value
    assert len(viewer.layers) == 1
    widget.image.value = viewer.model.add_image(counts(20, 22))
    widget.restore()
    done(widget)
    assert len(viewer.layers) == 3


def test_the_slider_begins_at_the_rules_choice_and_the_preview_follows_it(
    viewer: SimpleNamespace, widget: RestoreWidget, done: Callable[[RestoreWidget], None]
) -> None:
    data = counts(3, 300, 310)
    turned = np.array([[0, -1], [1, 0]])
    image = viewer.model.add_image(data, scale=(4, 0.5, 0.5), rotate=[[1, 0, 0], [0, *turned[0]], [0, *turned[1]]],
                                   affine=np.array([[1, 0, 0, 5], [0, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
                                   colormap="red")  # fmt: skip
    viewer.dims.set_point(0, image.data_to_world((2, 0, 0))[0])
    viewer.camera.center = (0, *image.data_to_world((2, 150, 100))[1:])
    widget.size.value = 1.0
    widget.automatic.value = False
    done(widget)
    preview = viewer.layers[-1]
    assert preview.name == f"{image.name} preview"
    assert preview.data.shape == (1, 160, 160)
    assert np.allclose(preview.data_to_world((0, 0, 0)), image.data_to_world((2, 70, 20)))
    assert np.allclose(preview.data_to_world((0, 3, 9)), image.data_to_world((2, 73, 29)))
    assert preview.colormap.name == "red"
    part = data[2, 70:230, 20:180]
    psf = lsconv.psf.gaussian(1.0).numpy()
    chosen = lsconv.deconvolve(part.astype(np.float32), psf)
    assert 10**widget.strength.value == pytest.approx(float(chosen.damp), rel=0.2)  # of the slider's steps
    assert widget.strength.max - widget.strength.min == pytest.approx(6)
    assert viewer.layers.selection == {image}
    assert preview not in widget.image.choices
    widget.strength.value += 0.5
    done(widget)
    (follower,) = [layer for layer in viewer.layers if layer.name.endswith("preview")]
    expected = lsconv.deconvolve(part.astype(np.float32), psf, damp=10**widget.strength.value).x
    assert np.abs(follower.data[0].astype(float) - expected.clip(0)).max() <= 1
    widget.size.value = 1.5
    done(widget)
    assert not np.array_equal(viewer.layers[-1].data, follower.data)
    widget.restore()
    done(widget)
    assert [layer.name for layer in viewer.layers] == [image.name, f"{image.name} restored"]


def test_the_evidence_of_a_stack_is_kept_of_the_field_that_is_shown_alone() -> None:
    from lsconv.napari.widget import _restore_fields

    problem = Problem.of(counts(3, 20, 22), np.ones((3, 3)), Settings(strength=0.2))
    fields = problem.fields()
    work = _restore_fields(problem, fields, fields[1], threading.Event())
    with pytest.raises(StopIteration) as ended:
        while True:
            next(work)
    found = ended.value.value
    assert [restored.evidence is not None for _, restored in found] == [False, True, False]


def test_a_preview_that_is_requested_does_not_outlive_the_window(viewer: SimpleNamespace, qtbot: Any) -> None:
    from qtpy.QtCore import QEvent
    from qtpy.QtWidgets import QApplication

    closed = RestoreWidget(viewer)
    viewer.model.add_image(counts(20, 22))
    closed.automatic.value = False
    assert closed._wanted is not None
    closed.native.deleteLater()
    QApplication.sendPostedEvents(closed.native, QEvent.Type.DeferredDelete)
    with qtbot.captureExceptions() as raised:
        qtbot.wait(2 * _DELAY)
    assert raised == []
    assert closed.worker is None


def test_without_the_preview_the_slider_says_nothing(viewer: SimpleNamespace, widget: RestoreWidget) -> None:
    viewer.model.add_image(counts(20, 22))
    widget.live.value = False
    widget.automatic.value = False
    widget.strength.value = 0.0
    assert widget.worker is None
    assert widget._wanted is None


def test_masks_of_another_shape_are_refused_by_a_sentence(viewer: SimpleNamespace, widget: RestoreWidget) -> None:
    viewer.model.add_image(counts(20, 22))
    labels = viewer.model.add_labels(np.zeros((5, 5), int))
    assert type(labels) is Labels
    widget.mask.value = labels
    widget.restore()
    assert widget.status.value == "bad pixels: of shape (5, 5), expected the image's, (20, 22), or its last axes"
