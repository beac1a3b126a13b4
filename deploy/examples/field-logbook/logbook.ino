// A weather station's logbook: every ten minutes, and when the button between pin 2 and ground is pressed, it tells
// flashd what it measured and shows by its LED that an entry was made. A TMP36 is at A0.
// flashd.yaml beside this sketch has the other end of the cable.

const int BUTTON = 2;
const unsigned long DEBOUNCE_MS = 50;
const unsigned long EVERY_MS = 600000;
const unsigned long LIT_MS = 2000;
String line;
unsigned long entry = 0, asked = 0, pressedAt = 0, litAt = 0;
bool held = false;

void setup() {
  pinMode(BUTTON, INPUT_PULLUP);
  pinMode(LED_BUILTIN, OUTPUT);
  Serial.begin(115200);
  line.reserve(512);
}

// TMP36: 0.5 V at 0 degrees and 10 mV more for each degree
float degrees() { return analogRead(A0) * 5.0 / 1023.0 * 100.0 - 50.0; }

void ask(const __FlashStringHelper *why) {
  asked = millis();
  entry += 1;
  Serial.print(F("{\"id\":"));
  Serial.print(entry);
  Serial.print(F(",\"prompt\":\""));
  Serial.print(why);
  Serial.print(F(" The thermometer shows "));
  Serial.print(degrees(), 1);
  Serial.println(F(" degrees Celsius. Write the entry.\",\"max_tokens\":48}"));
}

void loop() {
  bool down = digitalRead(BUTTON) == LOW;
  if (!down) {
    pressedAt = 0;
    held = false;
  } else if (pressedAt == 0) {
    pressedAt = millis();
  } else if (!held && millis() - pressedAt > DEBOUNCE_MS) {
    held = true;
    ask(F("A visitor asks for an entry."));
  }
  if (millis() - asked > EVERY_MS) ask(F("It is time for an entry."));
  if (litAt != 0 && millis() - litAt > LIT_MS) {
    litAt = 0;
    digitalWrite(LED_BUILTIN, LOW);
  }
  while (Serial.available()) {
    char c = Serial.read();
    if (c != '\n') {
      if (line.length() < 500) line += c;
      continue;
    }
    if (line.indexOf(F("\"event\":\"end\"")) >= 0 && line.indexOf(F("\"state\":\"done\"")) >= 0) {
      litAt = millis();
      digitalWrite(LED_BUILTIN, HIGH);
    }
    line = "";
  }
}
