"""The widget: choices, a live preview of a crop, a thread that restores field by field, the answer as a layer."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from magicgui.widgets import (
    CheckBox,
    ComboBox,
    Container,
    FloatSlider,
    FloatSpinBox,
    Label,
    ProgressBar,
    PushButton,
)
from napari.layers import Image, Labels, Layer

import lsconv
from lsconv.app import Evidence, report_figure
from lsconv.napari.problem import MODELS, CancelledError, Index, Problem, Restored, Settings, psf_of

if TYPE_CHECKING:
    from napari.viewer import Viewer

__all__ = ["RestoreWidget"]

_LAYER = "a layer"
_DECADES = 3.0  # the slider's range to each side of the strength that a rule chose
_DELAY = 200  # milliseconds from a move of the slider to the preview
_DPI = 62  # makes the report about as wide as a dock widget
_PREVIEW = "lsconv preview"  # the key in the metadata of a layer that is a preview

Restorations = list[tuple[Index, Restored]]


class RestoreWidget(Container):  # type: ignore[misc]
    """Restore an image layer whose blur is known.

    Args:
        napari_viewer: the viewer whose layers are offered.

    Attributes:
        worker: the thread that is running, or None.
        report: the scroll area of the last report, whose figure is its attribute ``figure``; or None.
    """

    def __init__(self, napari_viewer: Viewer) -> None:
        from qtpy.QtCore import QTimer  # imports Qt

        super().__init__(labels=True)
        self._viewer = napari_viewer
        self.worker: Any = None
        self.report: Any = None
        self._cancelled = threading.Event()
        self._wanted: str | None = None  # the preview to come: with the strength "as chosen" or "by rule"
        self._timer = QTimer(self.native, singleShot=True)  # a child, so that it ends with the window
        self._timer.timeout.connect(self._preview)
        self.image = ComboBox(label="image", choices=self._images, tooltip="Every time, channel and slice apart.")
        self.blur = ComboBox(label="blur", choices=(*MODELS, _LAYER), tooltip="The PSF: a model or a layer.")
        self.psf = ComboBox(label="PSF layer", choices=self._images, nullable=True, tooltip="Divided by its sum.")
        self.size = FloatSpinBox(label="sigma", value=2.0, min=0.1, max=500.0, step=0.1, tooltip="In pixels.")
        self.angle = FloatSpinBox(label="angle", value=0.0, min=-180.0, max=180.0, tooltip="Degrees.")
        self.depth = FloatSpinBox(
            label="sigma along z", value=0.0, min=0.0, max=500.0, step=0.1,
            tooltip="In slices; 0: every slice is restored by itself.",
        )  # fmt: skip
        self.boundary = ComboBox(
            label="beyond the edge", choices=("unknown", "reflect", "zero", "periodic"),
            tooltip="What the scene is like beyond the image; unknown: nothing is assumed.",
        )  # fmt: skip
        self.mask = ComboBox(label="bad pixels", choices=self._masks, nullable=True, tooltip="Labels other than zero.")
        self.noise = ComboBox(label="noise", choices=("gaussian", "poisson"))
        self.background = FloatSpinBox(
            label="background", value=0.0, min=-1e9, max=1e9, tooltip="Light without the scene, in grey levels."
        )
        self.gain = FloatSpinBox(label="gain", value=1.0, min=1e-6, max=1e9, tooltip="Grey levels per photon.")
        self.prior = ComboBox(
            label="prior", choices=("gradient", "tikhonov", "tv"), tooltip="What images are like: smooth, small, flat."
        )
        self.automatic = CheckBox(label="strength by a rule", value=True, tooltip="Chosen from the image itself.")
        self.strength = FloatSlider(label="log10 damp", value=-1.0, min=-6.0, max=6.0, step=0.05)
        self.live = CheckBox(label="preview a crop", value=True, tooltip="Around the middle of the view.")
        self.nonnegative = CheckBox(label="nonnegative", value=False)
        self.error_bars = CheckBox(label="error bars", value=False, tooltip="A layer of standard deviations.")
        self.button = PushButton(label="Restore")
        self.cancel = PushButton(label="Cancel", enabled=False)
        self.progress = ProgressBar(label="fields", value=0, min=0, max=1)
        self.status = Label(label="", value="")
        self.extend([
            self.image, self.blur, self.psf, self.size, self.angle, self.depth, self.boundary, self.mask, self.noise,
            self.background, self.gain, self.prior, self.automatic, self.strength, self.live, self.nonnegative,
            self.error_bars, self.button, self.cancel, self.progress, self.status,
        ])  # fmt: skip
        for layers_changed in (napari_viewer.layers.events.inserted, napari_viewer.layers.events.removed):
            layers_changed.connect(self._offer_layers)
        for choice in (self.blur, self.noise, self.prior, self.automatic, self.nonnegative):
            choice.changed.connect(self._show_choices)
        self.button.changed.connect(self.restore)
        self.cancel.changed.connect(self.stop)
        for choice in (self.automatic, self.noise, self.prior):  # these change the scale of the strength
            choice.changed.connect(self._centre_slider)
        for choice in (
            self.strength, self.blur, self.psf, self.size, self.angle, self.depth, self.mask, self.background,
            self.gain, self.nonnegative,
        ):  # fmt: skip
            choice.changed.connect(self._preview_soon)
        self._show_choices()

    # ------------------------------------------------------------------------------------------------- choices

    def _images(self, _: Any) -> list[Layer]:
        return [each for each in self._viewer.layers if isinstance(each, Image) and _PREVIEW not in each.metadata]

    def _masks(self, _: Any) -> list[Layer]:
        return [each for each in self._viewer.layers if isinstance(each, Labels)]

    def _offer_layers(self, _: Any = None) -> None:
        for box in (self.image, self.psf, self.mask):
            box.reset_choices()

    def _show_choices(self, _: Any = None) -> None:
        """Show the fields that apply to the choices, and hide the others."""
        blur = self.blur.value
        self.psf.visible = blur == _LAYER
        self.size.visible = blur != _LAYER
        self.size.label = MODELS.get(blur, "size")
        self.angle.visible = blur == "motion"
        self.depth.visible = blur == "gaussian"
        self.gain.visible = self.noise.value == "poisson"
        self.strength.visible = self.live.visible = not self.automatic.value
        self.strength.label = "log10 weight" if self.prior.value == "tv" else "log10 damp"
        self.error_bars.visible = self._has_error_bars()

    def _has_error_bars(self) -> bool:
        return self.noise.value == "gaussian" and self.prior.value != "tv" and not self.nonnegative.value

    def problem(self) -> Problem:
        """Make the problem from the choices.

        Raises:
            ArgumentError: a choice is missing, or does not fit the image.
        """
        image = self.image.value
        if image is None:
            raise lsconv.ArgumentError("image: open one first")
        if self.blur.value == _LAYER and self.psf.value is None:
            raise lsconv.ArgumentError("PSF layer: choose one")
        psf = (
            _highest(self.psf.value) if self.blur.value == _LAYER
            else psf_of(self.blur.value, self.size.value, self.angle.value, self.depth.value)
        )  # fmt: skip
        settings = Settings(
            self.boundary.value, self.noise.value, self.background.value, self.gain.value, self.prior.value,
            None if self.automatic.value else 10.0**self.strength.value, self.nonnegative.value,
            self.error_bars.value and self._has_error_bars(),
        )  # fmt: skip
        mask = None if self.mask.value is None else _highest(self.mask.value)
        labels = getattr(image, "axis_labels", ())
        return Problem.of(_highest(image), psf, settings, colour=image.rgb, mask=mask, labels=labels)

    # ----------------------------------------------------------------------------------------------- the answer

    def restore(self, _: Any = None) -> None:
        """Start a thread that restores the image."""
        if self.worker is not None:
            return
        try:
            problem = self.problem()
        except lsconv.LsconvError as error:
            self.status.value = str(error)
            return
        fields = problem.fields()
        shown = problem.field_at(self._pixel_in_view(self.image.value))
        self.progress.max, self.progress.value = (
            len(fields) if len(fields) > 1 else 0,
            0,
        )  # a maximum of 0 shows a busy bar
        work = _restore_fields(problem, fields, shown, self._cancelled)
        self._begin(work, self._finish, self.image.value, problem, shown)

    def stop(self, _: Any = None) -> None:
        """Stop the thread before its next operation of torch, and discard its work."""
        self._cancelled.set()
        self._wanted = None
        if self.worker is not None:
            self.status.value = "cancelling"

    def _begin(self, work: Any, finish: Callable[..., None], *arguments: Any) -> None:
        """Start a thread, and show its progress.

        Args:
            work: a generator that yields the number of fields done, and returns their restorations or None.
            finish: called with the restorations, and the further ``arguments``, unless the work is cancelled or fails.
        """
        from napari.qt.threading import create_worker  # imports Qt

        self._cancelled.clear()
        self.button.enabled, self.cancel.enabled = False, True
        self.status.value = "working"

        def run() -> Generator[int, None, Any]:
            try:
                return (yield from work)
            except (lsconv.LsconvError, MemoryError, RuntimeError) as error:  # shown in the status, not raised
                return str(error) or "not enough memory"

        def reset() -> None:
            self.worker = None
            self.progress.max = max(1, self.progress.max)
            self.button.enabled, self.cancel.enabled = True, False

        def end(result: Any) -> None:
            reset()
            if isinstance(result, str):
                self.status.value = result
            elif result is None:
                self.status.value = "cancelled"
            else:
                finish(result, *arguments)
            self._preview()  # choices may have changed meanwhile

        def fail(error: Exception) -> None:
            reset()
            self.status.value = f"{type(error).__name__}: {error}"
            raise error  # napari shows it with a traceback

        def count(done: int) -> None:
            if finish == self._finish and self.progress.max:
                self.progress.value = done

        connected = {"returned": end, "yielded": count, "errored": fail}
        self.worker = create_worker(run, _start_thread=False, _connect=connected)
        self.worker.start()

    def _finish(self, fields: Restorations, image: Image, problem: Problem, shown: Index) -> None:
        """Add the layers of the answer, and show the report about the field ``shown``."""
        self.progress.value = self.progress.max
        first = fields[0][1]
        values = np.empty(problem.data.shape, first.values.dtype)
        deviations = None if first.std is None else np.empty(problem.shape, first.std.dtype)
        for index, restored in fields:
            values[index] = restored.values
            if deviations is not None:
                deviations[index] = restored.std
        strengths = [restored.strength for _, restored in fields]
        restored = next(restored for index, restored in fields if index == shown)
        failed = sum(not each.converged for _, each in fields)
        name = "weight" if problem.settings.prior == "tv" else "damp"
        strength = f"{name} {' to '.join(dict.fromkeys(f'{each:.3g}' for each in (min(strengths), max(strengths))))}"
        status = f"{failed} of {len(fields)} field(s) not converged" if failed else restored.status
        remarks = dict.fromkeys(remark for _, each in fields for remark in each.remarks)
        self.status.value = "\n".join([strength, status, *remarks])
        metadata = {"lsconv": {"version": lsconv.__version__, name: strengths, "converged": not failed,
                            **asdict(problem.settings)}}  # fmt: skip
        self._remove_preview()
        self._viewer.add_layer(_beside(image, values, "restored", metadata))
        if deviations is not None:
            self._viewer.add_layer(_beside(image, deviations, "standard deviation", metadata, plain=True))
        if restored.evidence is not None:
            self._show_report(restored.evidence, f"{image.name}: {strength}. {status}")

    def _show_report(self, evidence: Evidence, title: str) -> None:
        """Show the report in a dock widget, in place of the previous one."""
        from matplotlib.backends.backend_qtagg import FigureCanvasQTAgg  # imports Qt
        from qtpy.QtWidgets import QScrollArea

        window = self._viewer.window
        if self.report is not None and self.report.parent() is not None:
            window.remove_dock_widget(self.report)
        figure, _ = report_figure(evidence, title)
        figure.set_dpi(_DPI)
        canvas = FigureCanvasQTAgg(figure)
        canvas.setFixedSize(*canvas.get_width_height())
        self.report = QScrollArea()
        self.report.setWidget(canvas)
        self.report.figure = figure
        window.add_dock_widget(self.report, name="lsconv report", area="right", tabify=True)

    # ---------------------------------------------------------------------------------------------- the preview

    def _remove_preview(self) -> None:
        for each in [each for each in self._viewer.layers if _PREVIEW in each.metadata]:
            self._viewer.layers.remove(each)

    def _pixel_in_view(self, image: Image) -> tuple[int, ...]:
        """The index of the pixel at the middle of the view, in the slice that is shown."""
        dims = self._viewer.dims
        point = list(dims.point)
        for axis, centre in zip(dims.displayed, self._viewer.camera.center[-len(dims.displayed) :], strict=True):
            point[axis] = centre
        return tuple(round(float(at)) for at in image.world_to_data(point[len(point) - image.ndim :]))

    def _centre_slider(self, _: Any = None) -> None:
        """Preview with the strength that a rule chooses, which becomes the middle of the slider."""
        self._request_preview("by rule")

    def _preview_soon(self, _: Any = None) -> None:
        self._request_preview(self._wanted or "as chosen")

    def _request_preview(self, preview: str) -> None:
        """Start a preview after a short delay, in which further requests join it."""
        if self.live.value and not self.automatic.value:
            self._wanted = preview
            if not self._timer.isActive():
                self._timer.start(_DELAY)

    def _preview(self) -> None:
        """Start a thread that restores a crop around the middle of the view, if a preview is requested."""
        if not self.live.value or self.automatic.value:
            self._wanted = None
        if self.worker is not None or self._wanted is None:
            return
        by_rule, self._wanted = self._wanted == "by rule", None
        try:
            whole = self.problem()
        except lsconv.LsconvError as error:
            self.status.value = str(error)
            return
        if by_rule:
            whole = whole.by_rule()
        problem, part = whole.cropped(self._pixel_in_view(self.image.value))
        work = _restore_fields(problem, problem.fields(), None, self._cancelled)
        self._begin(work, self._show_preview, self.image.value, problem, part, by_rule)

    def _show_preview(
        self, fields: Restorations, image: Image, problem: Problem, part: tuple[slice, ...], by_rule: bool
    ) -> None:
        """Show the one field of a crop as a layer, and centre the slider if a rule chose the strength."""
        index, restored = fields[0]
        values = np.empty(problem.data.shape, restored.values.dtype)
        values[index] = restored.values
        self._remove_preview()
        self._viewer.add_layer(_beside(image, values, "preview", {_PREVIEW: True}, part=part))
        self._viewer.layers.selection = {image}
        self.status.value = f"preview: {self.strength.label.split()[-1]} {restored.strength:.3g}"
        if by_rule and restored.strength > 0:
            middle = math.log10(restored.strength)
            with self.strength.changed.blocked():
                self.strength.range = middle - _DECADES, middle + _DECADES
                self.strength.value = middle


def _restore_fields(
    problem: Problem, fields: list[Index], shown: Index | None, cancelled: threading.Event
) -> Generator[int, None, Restorations | None]:
    """Restore fields one by one; yields the number done, and returns the restorations, or None when cancelled.

    Only the field ``shown`` keeps its evidence, for the report.
    """
    done = []
    for index in fields:
        try:
            restored = problem.restore(index, cancelled.is_set)
        except CancelledError:
            return None
        done.append((index, restored if index == shown else replace(restored, evidence=None)))
        yield len(done)
    return None if cancelled.is_set() else done


def _highest(layer: Layer) -> Any:
    """The data of a layer, at the highest resolution where it has several levels."""
    return layer.data[0] if layer.multiscale else layer.data


def _beside(
    image: Image, values: np.ndarray[Any, Any], suffix: str, metadata: dict[str, Any], *,
    part: tuple[slice, ...] | None = None, plain: bool = False,
) -> Layer:  # fmt: skip
    """Make a layer with the position and display of an image's: scale, translation, units, axes, colours and metadata.

    Args:
        image: the image's layer.
        values: the data of the new layer.
        suffix: the end of the new layer's name, after the image's.
        metadata: further metadata.
        part: the slices of the image that the values cover; None: all of it.
        plain: whether the values are of another kind, with a colour map and limits of their own.
    """
    _, attributes, kind = image.as_layer_data_tuple()
    for key in ("multiscale", "locked_data_level", "visible", "auto_contrast", *(("rgb",) if plain else ())):
        attributes.pop(key, None)
    if plain:
        attributes.pop("contrast_limits")
        attributes["colormap"] = "magma"
    attributes["name"] = f"{image.name} {suffix}"
    attributes["metadata"] = {**image.metadata, **metadata}
    if part is not None:
        corner = np.asarray(image.data_to_world([cells.start for cells in part]))
        attributes["translate"] = image.affine.inverse(corner)
    return Layer.create(values, attributes, kind)
