"""Texts that look like messages or dialogues and are not read: rendered by a chat template, in another notation, with turns of other names."""

from __future__ import annotations

import re

from stages.text.dialogue import COLON, unanswered
from stages.text.forms import written_conversation
from stages.text.thoughts import Thoughts, unwrapped
from stages.text.written import UNSEEN, bare

_LAST = 100  # characters
_MARK = (
    r"<[|｜][^<>|｜\s]{1,40}[|｜]?>|\[\|[^\[\]|\s]{1,40}\|\]|\[/?INST\]|\[(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|gMASK|EOS|SEP|CLS)\]|<reserved_10[0-9]>"
    r"|<(?:start_of_turn|end_of_turn|extra_id_1|BOS_TOKEN|bos|eo[adhmst]|seed:[be]os)>|(?:GPT4 Correct|Math Correct|Code) (?:User|Assistant):"
)
_BEGUN, _ENDED = re.compile(rf"\s*(?:<s>\s*)?(?:{_MARK})"), re.compile(rf"(?:{_MARK}|</s>)\s*\Z")
"""A control mark where a template puts one: `<|...|>` and DeepSeek's `<｜...｜>`, and those that are written otherwise."""
_TURNED = re.compile(r"</s>\s*(?:<s>\s*)?\[INST\]|<extra_id_1>(?:System|User|Assistant)\n")
"""Where the next turn begins, in templates that put no mark before the first (Llama 2's is often cut off); other marks in the
middle of a text may be spoken of, and are neutralised."""
_HARMONY = re.compile(r"\s*(?:analysis|commentary)(?=\S)")
"""How gpt-oss's answers begin where the marks were left out; `assistantfinal` follows."""
_DECODED = re.compile(
    r"\s*(?:(?:assistant|model)\n|(?:system|user)\n(?s:.*)(?:(?<=[\n.?!。？！])|(?<=[.?!]\s))(?:assistant|model)[^\S\n]*(?:\n|\Z))"
)
"""The names of turns, which templates write as text, where the marks around them were left out in decoding."""
_THOUGHTS = Thoughts("")
USERS = (
    "Human|User|Mensch|Nutzer|Benutzer|Humain|Utilisateur|Humano|Usuario|Usuário|Umano|Utente|Mens|Gebruiker|Människa|Användare"
    "|Bruker|Bruger|Käyttäjä|Człowiek|Użytkownik|Uživatel|Používateľ|Felhasználó|Utilizator|Человек|Пользователь|Людина|Користувач"
    "|Χρήστης|Kullanıcı|İnsan|人类|人類|用户|用戶|使用者|人間|ユーザー|인간|사용자|المستخدم|الإنسان|کاربر|انسان|משתמש|उपयोगकर्ता|मानव"
    "|ব্যবহারকারী|ผู้ใช้|มนุษย์|Người dùng|Pengguna|Manusia|Mtumiaji"
)
_ASSISTANTS = (
    "Assistant|Bot|AI|Assistent|Asistente|Assistente|Asystent|Asistent|Asszisztens|Avustaja|Ассистент|Помощник|Асистент|Помічник"
    "|Βοηθός|Asistan|助手|助理|アシスタント|어시스턴트|도우미|المساعد|مساعد|دستیار|עוזר|सहायक|সহকারী|ผู้ช่วย|Trợ lý|Asisten|Msaidizi"
)
_EITHER = f"System|{USERS}|{_ASSISTANTS}"
_OTHER_TURN = re.compile(
    rf"(?:\A|(?<=[\n>]))[ \t{UNSEEN}]*(?:(?:#{{1,6}} ?)?({_EITHER}){COLON}|#{{1,6}} ?({_EITHER})[ \t]*(?=\n|\Z)"
    rf"|\*\*({_EITHER})(?:{COLON}\s?\*\*|\*\*{COLON})|[<\[【]({_EITHER})[>\]】])",
    re.IGNORECASE,
)
"""Turns that are named in other languages or marked in other ways: "Mensch:", "**Human:**", "<human>:", "### User"."""
_OTHER_ALPACA = re.compile(
    r"^#{1,4} ?(?:(?P<asked>Instruction|Anweisung|Instrucción|Instrução|Istruzione|Instructie|Polecenie|Инструкция|指令|指示|지시"
    r"|निर्देश|تعليمات|Instruksi|Talimat)|(?P<answer>Response|Antwort|Réponse|Respuesta|Resposta|Risposta|Antwoord|Odpowiedź"
    r"|Ответ|回答|回复|响应|応答|응답|답변|प्रतिक्रिया|الرد|Respons|Yanıt))[ \t]*(?:[:：]|$)",
    re.IGNORECASE | re.MULTILINE,
)
_FIRST_NAME, _LAST_NAME = (
    re.compile(rf"{name}\s?[:：]{end}")
    for name, end in ((r"([^\s:：][^\n:：]{0,30}?)", ""), (r"[^\S\n]*([^\s:：][^\n:：]{0,30}?)", r"\s*"))
)
_LAST_LABEL = re.compile(r"[^\S\n]*([^\s:：#@][^\n:：]{0,30}?\s?[:：]|(?:#{1,6}|@@) ?[^\s:：#@][^\n:：]{0,30})\s*")
_GAP = r"""(?:[\s"'`“”„‘’«»\\]|&(?:quot|apos|\#3[49]);)*"""
_SPEAKER = "user|human|assistant|system|gpt|chatgpt|bot|chatbot|model|ai|developer|prompter|tool"
_MEMBER = "role|from|speaker|author|type|content|value|text|message|messages|conversations|conversation|data"
_RECORD = re.compile(
    rf"(?:(?:[\w.]{{0,40}}[\[({{]{_GAP}:?)+|(?:(?:messages|conversations?):\s*)?-\s{_GAP})(?:{_MEMBER}){_GAP}(?:=>|[=:,])",
    re.IGNORECASE,
)
_WHO = re.compile(rf"\b(?:role|from|speaker|author|type){_GAP}(?:=>|[=:,]){_GAP}(?:{_SPEAKER})(?![\w-])", re.IGNORECASE)
_WHAT = re.compile(rf"\b(?:content|value|text|message|parts|data){_GAP}(?:=>|[=:,])", re.IGNORECASE)
"""A record that begins with a member of messages, in any brackets and quotes or as YAML, has a speaker and says something."""
_NOTED = re.compile(
    rf"(?:[\[({{]{_GAP}){{2,}}(?:{_SPEAKER}){_GAP},"
    rf"|\[?\s*(?:Human|AI|System|Chat|Tool)Message(?:Chunk)?\("
    rf"|{_GAP}role{_GAP}:{_GAP}(?:{_SPEAKER})['\"]?[ \t]*\n{_GAP}content{_GAP}:",
    re.IGNORECASE,
)
"""Speakers first in brackets in brackets, LangChain's messages, and YAML of one."""
_LANGCHAIN = re.compile(r"""content=(?=['"])""")


def looks_rendered(text: str) -> bool:
    """Whether a text begins or ends as a chat template's output does, or has its turns; a thought before the answer aside."""
    return _has_marks(text) and _has_marks(unwrapped(_THOUGHTS.split(text).said))


def _has_marks(text: str) -> bool:
    return (
        _BEGUN.match(bare(text)) is not None
        or _ENDED.search(text, max(0, len(text) - _LAST)) is not None
        or _TURNED.search(text) is not None
        or (_HARMONY.match(text) is not None and "assistantfinal" in text)
        or _DECODED.match(text) is not None
    )


def looks_noted(text: str) -> bool:
    """Whether a text is messages in a notation that `written_conversation` does not read, or in a fenced block."""
    text = bare(text).rstrip()
    if text.startswith("```") and text.endswith("```"):
        inside = text[3:-3].partition("\n")[2].strip()
        return "```" not in inside and (
            written_conversation(inside, lambda note: None) is not None or _is_noted(inside)
        )
    return _is_noted(text)


def _is_noted(text: str) -> bool:
    if _NOTED.match(text) is not None:
        return True
    if _LANGCHAIN.match(text) is not None:
        return " additional_kwargs={" in text
    return _RECORD.match(text) is not None and _WHO.search(text) is not None and _WHAT.search(text) is not None


def looks_turned(text: str) -> bool:
    """Whether a text is a dialogue whose turns are named in another language or marked in another way than `dialogue` reads:
    it begins with a turn, and has one of either side."""
    if "#" in text and [mark.lastgroup for mark in _OTHER_ALPACA.finditer(text)][:2] == ["asked", "answer"]:
        return True
    text = bare(text)
    if unanswered(text):
        return True
    if _OTHER_TURN.match(text) is None:
        return False
    names = {mark[mark.lastindex or 0].casefold() for mark in _OTHER_TURN.finditer(text)}
    return all(not names.isdisjoint(side.casefold().split("|")) for side in (USERS, _ASSISTANTS))


def last_name(text: str) -> str | None:
    """The label or heading that the last of several lines is: "Answer:", "### Assistant"."""
    text = bare(text).rstrip()
    found = _LAST_LABEL.fullmatch(text, text.rfind("\n") + 1) if "\n" in text else None
    return found and found[1]


def outer_names(text: str) -> tuple[str, str] | None:
    """What a text begins with before a colon, and the other that its last line is: ("Question", "Answer")."""
    text = bare(text).rstrip()
    first = _FIRST_NAME.match(text)
    last = _LAST_NAME.fullmatch(text, text.rfind("\n") + 1) if first and "\n" in text else None
    return (first[1], last[1]) if first and last and first[1] != last[1] else None
