// Asks flashd a question over USB when a button between pin 2 and ground is pressed, and lights the built-in LED
// while the answer is "water". In flashd.yaml:
//   serial: [{name: arduino, port: /dev/ttyACM0, baud: 115200, mode: machine, charset: ascii}]

const int BUTTON = 2;
const unsigned long DEBOUNCE_MS = 50;
String line;
unsigned long pressedAt = 0;
bool asked = false;

void setup() {
  pinMode(BUTTON, INPUT_PULLUP);
  pinMode(LED_BUILTIN, OUTPUT);
  Serial.begin(115200);
  line.reserve(512);
}

void loop() {
  if (digitalRead(BUTTON) == LOW) {
    if (pressedAt == 0) pressedAt = millis();
    if (!asked && millis() - pressedAt > DEBOUNCE_MS) {
      asked = true;
      Serial.print(F("{\"id\":1,\"prompt\":\"Soil moisture reads "));
      Serial.print(analogRead(A0));
      Serial.println(F(" of 1023, which is dry below 300. Water or wait?\",\"choose\":[\"water\",\"wait\"]}"));
    }
  } else {
    pressedAt = 0;
    asked = false;
  }
  while (Serial.available()) {
    char c = Serial.read();
    if (c != '\n') {
      if (line.length() < 500) line += c;
      continue;
    }
    if (line.indexOf(F("\"event\":\"end\"")) >= 0)
      digitalWrite(LED_BUILTIN, line.indexOf(F("\"text\":\"water\"")) >= 0 ? HIGH : LOW);
    line = "";
  }
}
