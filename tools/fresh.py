"""Are the outputs that a notebook shows those that its cells give? Words must be the same, numbers nearly the same; times,
sizes, addresses and paths may differ."""
import re
from html import unescape

RELATIVE, ABSOLUTE = 5e-3, 1e-6  # two processors, after some steps of training; what is below the second is rounding
NUMBER = r"[-+−]?(?:\d[\d,]*\d|\d)?(?:\.\d+|\d\.?)(?:[eE][-+]?\d+)?"
UNITS = "s|ms|µs|us|ns|min|h|seconds?|minutes?|hours?|it/s|tokens/s|[kKMG]i?B|bytes"
SPOKEN_FOR = (  # what differs from machine to machine, and what stands for it
    (re.compile(r"\x1b\[[0-9;]*m"), ""),
    (re.compile(r"\b0x[0-9a-fA-F]{6,}"), "ADDRESS"),
    (re.compile(r"(?<![\w.])(?=[a-f]*\d)[0-9a-f]{12}(?![\w.]\w)"), "ID"),  # of an adapter
    (re.compile(r"(?<![\w<.~-])/(?:[\w.@+-]+/)+[\w.@+-]*"), "PATH"),
    (re.compile(rf"(?<![\w.]){NUMBER} ?(?:{UNITS})(?![\w/])"), "AMOUNT"),
)
STYLE, TAG = re.compile(r"<(style|script|svg)\b.*?</\1>", re.S), re.compile(r"<[a-zA-Z/!][^>]*>")
TOKEN = re.compile(rf"(?<![\w.])(?:{NUMBER}|[-+−]?(?:nan|inf)\b)(?![\w])|\w+|[^\w\s]")
TABLE_RULE = re.compile(r"[-─━=_]{2,}")


def plain(text: str) -> str:
    "A text without markup, and with a word in the place of whatever may differ between machines."
    text = unescape(TAG.sub(" ", STYLE.sub(" ", text)))
    for pattern, word in SPOKEN_FOR: text = pattern.sub(word, text)
    return TABLE_RULE.sub(" ", text)


def number(token: str) -> float | None:
    "The number that a token is, if it is one."
    try: return float(token.replace("−", "-").replace(",", "")) if re.search(r"\d|nan|inf", token) else None
    except ValueError: return None


def last_digit(token: str) -> float:
    "What one unit in the last place of a printed number is worth; 0 for a whole number, which is a count."
    digits, _, exponent = token.lower().partition("e")
    if "." not in digits and not exponent: return 0.0
    places = len(digits.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - places)


def same_token(old: str, new: str) -> bool:
    "Equal as text, or as numbers but for the last digits."
    if old == new: return True
    a, b = number(old), number(new)
    if a is None or b is None: return False
    slack = max(last_digit(old), last_digit(new))
    if not slack: return a == b
    return abs(a - b) <= max(RELATIVE * max(abs(a), abs(b)), ABSOLUTE, 1.001 * slack)


def same_text(old: str, new: str) -> bool:
    "Whether two texts say the same."
    a, b = TOKEN.findall(plain(old)), TOKEN.findall(plain(new))
    return len(a) == len(b) and all(map(same_token, a, b))


def joined(text: str | list[str]) -> str: return text if isinstance(text, str) else "".join(text)


def texts(outputs: list[dict]) -> list[tuple[str, str]]: # what kind of output -> its text
    "The readable outputs of a cell: what it printed as one text, its value, what it displayed. Warnings on stderr are left out."
    printed = "".join(joined(o["text"]) for o in outputs if o["output_type"] == "stream" and o["name"] == "stdout")
    values = [o for o in outputs if o["output_type"] == "execute_result"]  # a kernel shows it before the figures, a shell after
    displays = [o for o in outputs if o["output_type"] == "display_data"]
    shown = [(kind, joined(text)) for o in values + displays for kind, text in sorted(o["data"].items(), reverse=True)
             if kind.startswith("text/")]
    return [("printed", printed)] * bool(printed.strip()) + shown


def readable(kind: str, text: str) -> str:
    "An output as it is quoted in a message."
    return re.sub(r"\s*\n\s*", " ", plain(text)).strip() if kind == "text/html" else text.rstrip()


def differences(old: list[dict], new: list[dict], most: int = 1200) -> list[str]:
    "Where the outputs of a cell are not those that it gives now: both texts, cut at `most` characters."
    was, now = texts(old), texts(new)
    if [kind for kind, _ in was] != [kind for kind, _ in now]: pairs = [(was, now)]
    else: pairs = [([a], [b]) for a, b in zip(was, now) if not same_text(a[1], b[1])]
    quote = lambda side: "\n".join(f"({kind}) {readable(kind, text)}" for kind, text in side)[:most] or "no output"
    return [f"  committed: {quote(a)}\n  now: {quote(b)}" for a, b in pairs]
