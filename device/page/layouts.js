// The keyboard's letters, by language: three rows, the last of which has Shift and Delete at its ends.

export const LAYOUTS = {
  en: ["English", "qwertyuiop", "asdfghjkl", "zxcvbnm"],
  de: ["Deutsch", "qwertzuiopü", "asdfghjklöä", "yxcvbnmß"],
  fr: ["Français", "azertyuiop", "qsdfghjklm", "wxcvbnéèàç"],
  es: ["Español", "qwertyuiop", "asdfghjklñ", "zxcvbnmáéíóú"],
  it: ["Italiano", "qwertyuiopè", "asdfghjklòà", "zxcvbnmùì"],
  nl: ["Nederlands", "qwertyuiop", "asdfghjkl", "zxcvbnmëï"],
  pl: ["Polski", "qwertyuiopó", "asdfghjkląęł", "zxcvbnmżźćńś"],
  pt: ["Português", "qwertyuiop", "asdfghjklç", "zxcvbnmãõáé"],
  sv: ["Svenska", "qwertyuiopå", "asdfghjklöä", "zxcvbnm"],
  tr: ["Türkçe", "qwertyuıopğü", "asdfghjklşi", "zxcvbnmöç"],
  cs: ["Čeština", "qwertzuiopú", "asdfghjklůě", "yxcvbnmščřž"],
  ru: ["Русский", "йцукенгшщзхъ", "фывапролджэ", "ячсмитьбюё"],
  uk: ["Українська", "йцукенгшщзхї", "фівапролджє", "ячсмитьбюґ"],
  el: ["Ελληνικά", "ςερτυθιοπ", "ασδφγηξκλ", "ζχψωβνμάέί"],
};

export const SYMBOLS = ["1234567890", "!?:;\"'()-", "@#&%+=*/_€$"];
