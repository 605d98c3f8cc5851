"""Physical steps of an image's axes, and its channels' names and colours, as ImageJ, OME-XML and OME-Zarr say them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

__all__ = ["Calibration"]

_POWERS = {
    "yocto": ("y", -24), "zepto": ("z", -21), "atto": ("a", -18), "femto": ("f", -15), "pico": ("p", -12),
    "nano": ("n", -9), "micro": ("µ", -6), "milli": ("m", -3), "centi": ("c", -2), "deci": ("d", -1), "": ("", 0),
    "hecto": ("h", 2), "kilo": ("k", 3), "mega": ("M", 6), "giga": ("G", 9), "tera": ("T", 12), "peta": ("P", 15),
    "exa": ("E", 18), "zetta": ("Z", 21), "yotta": ("Y", 24),
}  # fmt: skip
_METERS = {f"{name}meter": 10.0**power for name, (_, power) in _POWERS.items()} | {"inch": 0.0254}
_TIMES = {f"{name}second": f"{sign}s" for name, (sign, _) in _POWERS.items()} | {
    "minute": "min", "hour": "h", "day": "d",
}  # fmt: skip
_LENGTHS = {f"{name}meter": f"{sign}m" for name, (sign, _) in _POWERS.items()} | {
    "inch": "in", "foot": "ft", "yard": "yd", "mile": "mi", "angstrom": "Å", "parsec": "pc",
}  # fmt: skip
_NAMES = {sign: name for name, sign in (_TIMES | _LENGTHS).items()} | {
    "um": "micrometer", "\u03bcm": "micrometer", "\\u00B5m": "micrometer", "micron": "micrometer",
    "microns": "micrometer", "us": "microsecond", "sec": "second",
}  # fmt: skip
_COLOURS = ("00FF00", "FF00FF", "00FFFF", "FFFF00", "FF0000", "0000FF")


@dataclass(frozen=True)
class Calibration:
    """Physical steps of axes, and what channels are called.

    Attributes:
        steps: by the letters T, Z, Y and X: the distance of neighbours, and its unit by the name that OME-Zarr has for
            it, such as "micrometer"; "" where there is none.
        channels: name and colour (six hexadecimal digits) of every channel, "" where there is none.

    Example:
        >>> Calibration({"X": (0.1, "micrometer"), "Y": (0.1, "micrometer")}).resolution
        (100000.0, 100000.0)
    """

    steps: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    channels: tuple[tuple[str, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps or self.channels)

    @classmethod
    def of_imagej(cls, said: Mapping[str, Any], resolution: tuple[float, float] | None) -> Calibration:
        """The calibration in ImageJ's description, and pixels per unit along x and y."""
        unit = said.get("unit", "")
        across, down = resolution or (1.0, 1.0)
        return cls(
            _telling(
                ("X", 1 / across, unit), ("Y", 1 / down, said.get("yunit", unit)),
                ("Z", said.get("spacing", 1.0), said.get("zunit", unit)),
                ("T", said.get("finterval", 1.0), said.get("tunit", "s") if "finterval" in said else ""),
            )
        )  # fmt: skip

    @classmethod
    def of_ome_xml(cls, text: str) -> Calibration:
        """The calibration of the first image in OME-XML; none where it cannot be read."""
        try:
            elements = ElementTree.fromstring(text).iter()
        except ElementTree.ParseError:
            return cls()
        pixels = next((each for each in elements if each.tag.rpartition("}")[2] == "Pixels"), None)
        if pixels is None:
            return cls()
        said = pixels.attrib
        steps = [(axis, said.get(f"PhysicalSize{axis}", 1.0), said.get(f"PhysicalSize{axis}Unit", "µm"))
                 for axis in "XYZ" if f"PhysicalSize{axis}" in said]  # fmt: skip
        if "TimeIncrement" in said:
            steps.append(("T", said["TimeIncrement"], said.get("TimeIncrementUnit", "s")))
        channels = [each.attrib for each in pixels if each.tag.rpartition("}")[2] == "Channel"]
        return cls(_telling(*steps), _named((each.get("Name", ""), _digits(each.get("Color"))) for each in channels))

    @classmethod
    def of_ome_zarr(
        cls, axes: Sequence[Mapping[str, Any]], scale: Sequence[float], channels: Sequence[Mapping[str, Any]]
    ) -> Calibration:
        """The calibration in an OME-Zarr image's axes, the scale of its highest level, and "omero"'s channels."""
        steps = zip((str(axis["name"]).upper() for axis in axes), scale, axes, strict=True)
        said = [each if isinstance(each, Mapping) else {} for each in channels]
        named = _named((str(each.get("label") or ""), str(each.get("color") or "")) for each in said)
        units = ((name, step, str(axis.get("unit") or "")) for name, step, axis in steps if name != "C")
        return cls(_telling(*units), named)

    @property
    def resolution(self) -> tuple[float, float] | None:
        """Pixels per centimetre along width and height, where these are lengths."""
        steps = [self.steps.get(axis, (1.0, "")) for axis in "XY"]
        if any(unit not in _METERS for _, unit in steps):
            return None
        across, down = (0.01 / (step * _METERS[unit]) for step, unit in steps)
        return across, down

    def ome_xml(self) -> dict[str, Any]:
        """The calibration in the words of OME-XML, as tifffile takes them."""
        said: dict[str, Any] = {}
        for axis, (step, unit) in self.steps.items():
            if axis == "T" and unit in _TIMES:
                said.update(TimeIncrement=step, TimeIncrementUnit=_TIMES[unit])
            if axis in "XYZ":
                said |= {f"PhysicalSize{axis}": step, f"PhysicalSize{axis}Unit": _LENGTHS.get(unit, "reference frame")}
        if self.channels:
            said["Channel"] = {"Name": [name for name, _ in self.channels]}
            if all(colour for _, colour in self.channels):
                said["Channel"]["Color"] = [_signed(colour) for _, colour in self.channels]
        return said

    def omero(self, limits: tuple[float, float]) -> dict[str, Any]:
        """The channels as OME-Zarr's "omero" has them, shown between the limits."""
        low, high = limits
        window = {"min": low, "max": high, "start": low, "end": high}
        return {
            "channels": [
                {"label": name, "color": colour or _COLOURS[index % len(_COLOURS)], "active": True, "window": window}
                for index, (name, colour) in enumerate(self.channels)
            ]
        }


def _telling(*steps: tuple[str, Any, str]) -> dict[str, tuple[float, str]]:
    """The steps that say something: positive numbers other than a one without a unit."""
    found = {}
    for axis, step, word in steps:
        unit = word.strip() if word.strip() in _TIMES | _LENGTHS else _NAMES.get(word.strip(), "")
        try:
            size = float(step)
        except (TypeError, ValueError):
            continue
        if math.isfinite(size) and size > 0 and (size, unit) != (1.0, ""):
            found[axis] = size, unit
    return found


def _named(channels: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The channels, unless none has a name."""
    found = tuple(channels)
    return found if any(name for name, _ in found) else ()


def _digits(colour: str | None) -> str:
    """Red, green and blue of OME-XML's colour, a signed integer of 32 bits that ends in the opacity."""
    try:
        return "" if colour is None else f"{(int(colour) & 0xFFFFFFFF) >> 8:06X}"
    except ValueError:
        return ""


def _signed(colour: str) -> int:
    try:
        value = int(colour, 16) << 8 | 0xFF
    except ValueError:
        return -1
    return value - 2**32 if value >= 2**31 else value
