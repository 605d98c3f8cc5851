"""Physical steps of an image's axes, and its channels' names and colours, in ImageJ, OME-XML and OME-Zarr."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

__all__ = ["Calibration"]

_PREFIXES = {
    "yocto": ("y", -24), "zepto": ("z", -21), "atto": ("a", -18), "femto": ("f", -15), "pico": ("p", -12),
    "nano": ("n", -9), "micro": ("µ", -6), "milli": ("m", -3), "centi": ("c", -2), "deci": ("d", -1), "": ("", 0),
    "hecto": ("h", 2), "kilo": ("k", 3), "mega": ("M", 6), "giga": ("G", 9), "tera": ("T", 12), "peta": ("P", 15),
    "exa": ("E", 18), "zetta": ("Z", 21), "yotta": ("Y", 24),
}  # fmt: skip
_METRES = {f"{name}meter": 10.0**power for name, (_, power) in _PREFIXES.items()} | {"inch": 0.0254}
_TIMES = {f"{name}second": f"{sign}s" for name, (sign, _) in _PREFIXES.items()} | {
    "minute": "min", "hour": "h", "day": "d",
}  # fmt: skip
_LENGTHS = {f"{name}meter": f"{sign}m" for name, (sign, _) in _PREFIXES.items()} | {
    "inch": "in", "foot": "ft", "yard": "yd", "mile": "mi", "angstrom": "Å", "parsec": "pc",
}  # fmt: skip
_NAMES = {sign: name for name, sign in (_TIMES | _LENGTHS).items()} | {
    "um": "micrometer", "\u03bcm": "micrometer", "\\u00B5m": "micrometer", "micron": "micrometer",
    "microns": "micrometer", "us": "microsecond", "sec": "second",
}  # fmt: skip
_COLOURS = ("00FF00", "FF00FF", "00FFFF", "FFFF00", "FF0000", "0000FF")


@dataclass(frozen=True)
class Calibration:
    """Physical steps of axes, and the names and colours of channels.

    Attributes:
        steps: for the axes T, Z, Y and X that have one: the distance between neighbours, and OME-Zarr's name of its
            unit, such as "micrometer"; "" for no unit.
        channels: name and colour (six hexadecimal digits) of every channel, "" for none.

    Example:
        >>> Calibration({"X": (0.1, "micrometer"), "Y": (0.1, "micrometer")}).resolution
        (100000.0, 100000.0)
    """

    steps: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    channels: tuple[tuple[str, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps or self.channels)

    @classmethod
    def of_imagej(cls, description: Mapping[str, Any], resolution: tuple[float, float] | None) -> Calibration:
        """Read the calibration in ImageJ's description.

        Args:
            description: its entries.
            resolution: pixels per unit along x and y, or None.
        """
        unit = description.get("unit", "")
        across, down = resolution or (1.0, 1.0)
        return cls(
            _valid_steps(
                ("X", 1 / across, unit), ("Y", 1 / down, description.get("yunit", unit)),
                ("Z", description.get("spacing", 1.0), description.get("zunit", unit)),
                ("T", description.get("finterval", 1.0),
                 description.get("tunit", "s") if "finterval" in description else ""),
            )
        )  # fmt: skip

    @classmethod
    def of_ome_xml(cls, text: str) -> Calibration:
        """Read the calibration of the first image in OME-XML; an empty one where the text is no OME-XML."""
        try:
            elements = ElementTree.fromstring(text).iter()
        except ElementTree.ParseError:
            return cls()
        pixels = next((each for each in elements if each.tag.rpartition("}")[2] == "Pixels"), None)
        if pixels is None:
            return cls()
        sizes = pixels.attrib
        steps = [(axis, sizes[f"PhysicalSize{axis}"], sizes.get(f"PhysicalSize{axis}Unit", "µm"))
                 for axis in "XYZ" if f"PhysicalSize{axis}" in sizes]  # fmt: skip
        if "TimeIncrement" in sizes:
            steps.append(("T", sizes["TimeIncrement"], sizes.get("TimeIncrementUnit", "s")))
        channels = [each.attrib for each in pixels if each.tag.rpartition("}")[2] == "Channel"]
        return cls(
            _valid_steps(*steps), _if_named((each.get("Name", ""), _digits(each.get("Color"))) for each in channels)
        )

    @classmethod
    def of_ome_zarr(
        cls, axes: Sequence[Mapping[str, Any]], scale: Sequence[float], channels: Sequence[Mapping[str, Any]]
    ) -> Calibration:
        """Read the calibration of an OME-Zarr image.

        Args:
            axes: the image's axes, each with a "name" and perhaps a "unit".
            scale: the scale of the highest level, a number for every axis.
            channels: the channels of "omero", each perhaps with a "label" and a "color".
        """
        steps = zip((str(axis["name"]).upper() for axis in axes), scale, axes, strict=True)
        entries = [each if isinstance(each, Mapping) else {} for each in channels]
        named = _if_named((str(each.get("label") or ""), str(each.get("color") or "")) for each in entries)
        units = ((name, step, str(axis.get("unit") or "")) for name, step, axis in steps if name != "C")
        return cls(_valid_steps(*units), named)

    @property
    def resolution(self) -> tuple[float, float] | None:
        """Pixels per centimetre along width and height; None where a unit is no length."""
        steps = [self.steps.get(axis, (1.0, "")) for axis in "XY"]
        if any(unit not in _METRES for _, unit in steps):
            return None
        across, down = (0.01 / (step * _METRES[unit]) for step, unit in steps)
        return across, down

    def ome_xml(self) -> dict[str, Any]:
        """The calibration as entries of OME-XML, by the names that tifffile expects."""
        entries: dict[str, Any] = {}
        for axis, (step, unit) in self.steps.items():
            if axis == "T" and unit in _TIMES:
                entries.update(TimeIncrement=step, TimeIncrementUnit=_TIMES[unit])
            if axis in "XYZ":
                symbol = _LENGTHS.get(unit, "reference frame")
                entries |= {f"PhysicalSize{axis}": step, f"PhysicalSize{axis}Unit": symbol}
        if self.channels:
            entries["Channel"] = {"Name": [name for name, _ in self.channels]}
            if all(colour for _, colour in self.channels):
                entries["Channel"]["Color"] = [_signed(colour) for _, colour in self.channels]
        return entries

    def omero(self, limits: tuple[float, float]) -> dict[str, Any]:
        """The channels as entries of OME-Zarr's "omero".

        Args:
            limits: the values shown as black and as full colour.
        """
        low, high = limits
        window = {"min": low, "max": high, "start": low, "end": high}
        return {
            "channels": [
                {"label": name, "color": colour or _COLOURS[index % len(_COLOURS)], "active": True, "window": window}
                for index, (name, colour) in enumerate(self.channels)
            ]
        }


def _valid_steps(*steps: tuple[str, Any, str]) -> dict[str, tuple[float, str]]:
    """The steps that are positive numbers, with OME-Zarr's name of the unit; a 1 without a unit is a default, left out.

    Args:
        steps: axis, step and unit, as a file has them.
    """
    valid = {}
    for axis, step, word in steps:
        unit = word.strip() if word.strip() in _TIMES | _LENGTHS else _NAMES.get(word.strip(), "")
        try:
            size = float(step)
        except (TypeError, ValueError):
            continue
        if math.isfinite(size) and size > 0 and (size, unit) != (1.0, ""):
            valid[axis] = size, unit
    return valid


def _if_named(channels: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The names and colours of the channels; empty where none has a name."""
    pairs = tuple(channels)
    return pairs if any(name for name, _ in pairs) else ()


def _digits(colour: str | None) -> str:
    """Convert OME-XML's colour, a signed integer of 32 bits RGBA, to six hexadecimal digits; "" where it is none."""
    try:
        return "" if colour is None else f"{(int(colour) & 0xFFFFFFFF) >> 8:06X}"
    except ValueError:
        return ""


def _signed(colour: str) -> int:
    """Convert six hexadecimal digits to OME-XML's colour, a signed 32-bit RGBA; white where they are none."""
    try:
        value = int(colour, 16) << 8 | 0xFF
    except ValueError:
        return -1
    return value - 2**32 if value >= 2**31 else value
