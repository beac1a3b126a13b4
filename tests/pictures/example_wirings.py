"""The wiring of each project in deploy/examples, from which its drawing is made."""

from __future__ import annotations

from tests.pictures.wiring import Bridge, Drawing, Part, Terminal, microcontroller, raspberry_pi

PI = raspberry_pi()


def _led(pin: str, ground: str) -> Part:
    return Part("LED", [Terminal("long leg", pin, "330 Ω"), Terminal("short leg", ground)])


def _button(name: str, pin: str, ground: str) -> Part:
    return Part(name, [Terminal("one contact", pin), Terminal("the other", ground)])


DRAWINGS = {
    "greenhouse": Drawing(
        "Greenhouse",
        PI,
        [
            Part(
                "DS18B20",
                [Terminal("VDD", "3.3 V (1)"), Terminal("data", "GPIO4 (7)"), Terminal("GND", "ground (9)")],
                bridge=Bridge(0, 1, "4.7 kΩ"),
            ),
            _button("button", "GPIO17 (11)", "ground (14)"),
            _button("yes", "GPIO27 (13)", "ground (6)"),
            _led("GPIO22 (15)", "ground (20)"),
            Part(
                "MCP3008",
                [
                    Terminal("VDD, VREF", "3.3 V (17)"), Terminal("DIN", "GPIO10 (19)"),
                    Terminal("DOUT", "GPIO9 (21)"), Terminal("CLK", "GPIO11 (23)"), Terminal("CS", "GPIO8 (24)"),
                    Terminal("AGND, DGND", "ground (25)"),
                ],
                beyond="moisture sensor\nits output at CH0\n3.3 V and ground",
            ),
            Part(
                "relay board",
                [
                    Terminal("VCC", "5 V (2)"), Terminal("IN1", "GPIO12 (32)"), Terminal("GND", "ground (34)"),
                    Terminal("IN2", "GPIO16 (36)"),
                ],
                beyond="pump and fan, with\nsupplies of their own",
            ),
        ],
    ),
    "talking-button": Drawing(
        "Talking button",
        PI,
        [
            _button("joke", "GPIO17 (11)", "ground (9)"),
            _button("animal", "GPIO27 (13)", "ground (14)"),
            _button("simpler", "GPIO23 (16)", "ground (20)"),
            _led("GPIO22 (15)", "ground (25)"),
            _button("mute", "GPIO26 (37)", "ground (39)"),
        ],
    ),
    "door-greeter": Drawing(
        "Door greeter",
        PI,
        [
            _button("door contact", "GPIO27 (13)", "ground (14)"),
            Part(
                "RGB LED",
                [
                    Terminal("red", "GPIO16 (36)", "330 Ω"), Terminal("green", "GPIO20 (38)", "330 Ω"),
                    Terminal("blue", "GPIO21 (40)", "330 Ω"), Terminal("common", "ground (39)"),
                ],
            ),
            _button("mute", "GPIO26 (37)", "ground (34)"),
        ],
    ),
    "field-logbook": Drawing(
        "Field logbook",
        microcontroller("Arduino Uno", "Its USB cable goes to the Raspberry Pi.", ["5V", "A0", "GND", "2", "GND "]),
        [
            Part("TMP36", [Terminal("+VS", "5V"), Terminal("VOUT", "A0"), Terminal("GND", "GND")]),
            _button("button", "2", "GND "),
        ],
    ),
    "fault-explainer": Drawing(
        "Fault explainer",
        PI,
        [
            Part(
                "MAX3232 board",
                [Terminal("VCC", "3.3 V (1)"), Terminal("GND", "ground (6)"), Terminal("R OUT", "GPIO15 (10)")],
                beyond="the machine's RS-232\nTX to R IN\nground to GND",
            ),
            _led("GPIO22 (15)", "ground (20)"),
        ],
    ),
}  # fmt: skip
"""By the name of the project's folder."""
