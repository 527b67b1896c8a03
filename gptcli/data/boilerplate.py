"""Lines of web pages that are no text: notices, navigation, menus.

In the spirit of C4 (Raffel et al. 2020, section 2.2), which dropped every line with the word
JavaScript or a cookie notice, but narrower: a line goes only if all of it is such a notice or menu,
so that a sentence about cookies stays. English and Chinese.
"""

import re

# Longer lines are paragraphs, whatever they begin with.
_MOST_CHARACTERS = 300

_SITE = r"(?:this|our|the) (?:web ?)?(?:site|page|app|application)"
_NOTICES = (
    # cookies and JavaScript
    rf"(?:please note:? |notice:? |by (?:using|continuing).{{0,60}}, )?{_SITE} uses? cookies\b.*",
    r"(?:by (?:using|browsing|continuing|clicking|closing)\b.{0,80}|we (?:and our partners )?use )"
    r"cookies\b.*(?:site|brows|experience|privacy|consent|policy|settings|analy|traffic|adverti).*",
    r"(?:accept|reject|allow|manage|decline) (?:all )?cookies?(?: (?:settings|preferences))?\.?",
    r"cookie (?:policy|settings|preferences|notice|consent)\.?",
    r"(?:you (?:need|have) to |you must |please |to .{0,60}(?:please |you must |must ))?"
    r"(?:enable|turn on|activate|allow) javascript\b.{0,120}",
    r"javascript (?:is|must be|appears to be|seems to be) (?:currently )?"
    r"(?:disabled|enabled|turned (?:off|on)|not enabled|not supported|required to view)\b.{0,120}",
    rf"{_SITE} (?:requires|needs|works best with) javascript\b.{{0,80}}",
    r"(?:sorry, )?your browser (?:does not|doesn't) support (?:javascript|html5|the (?:video|audio)"
    r"|iframes|inline frames)\b.{0,80}",
    # accounts
    r"(?:you must (?:be )?(?:log(?:ged)?|sign(?:ed)?) in|(?:please )?(?:log|sign) ?in"
    r"(?: or (?:register|sign ?up|create an account))?) to (?:post|reply|view|leave|comment|read"
    r"|see|continue|access|rate|vote|add)\b.{0,60}",
    r"(?:already (?:have an account|a member|registered)|don't have an account|not a member"
    r"|forgot(?:ten)?(?: your)? password)\b.{0,40}",
    r"(?:log|sign) ?(?:in|out|up)(?:(?: or | ?/ ?| \| )(?:log|sign) ?(?:in|up)"
    r"| or register| with (?:google|facebook|github|email|apple))",
    # navigation
    r"(?:skip|jump) to (?:main |primary |the )?(?:content|navigation|search|footer)\.?",
    r"(?:back|return|go) to (?:the )?top(?: of (?:the )?page)?\.?|toggle (?:navigation|menu)",
    r"(?:continue reading|read (?:more|the full (?:article|story)))(?: ?[»>→…].*|\.{3})?",
    r"(?:previous|next|older|newer) (?:page|posts?|articles?|entries|entry)(?: ?[»>→«<←])?",
    r"(?:share|print|email|bookmark) this(?: (?:page|article|post|story|on .{1,40}))?:?"
    r"|share (?:on|via|to) (?:facebook|twitter|x|linkedin|whatsapp|e-?mail|reddit|pinterest)",
    r"(?:subscribe to|sign up for) (?:our|the|my) "
    r"(?:(?:free|weekly|daily|monthly) )?newsletter.{0,60}",
    r"(?:leave a (?:comment|reply)|post a comment|load more(?: comments)?|view all comments"
    r"|follow us(?: on .{1,40})?"
    r"|click here to (?:subscribe|log ?in|register|download|print).{0,40})\.?",
    r"(?:site ?map|advertisements?|terms (?:of (?:use|service)|and conditions|& conditions)"
    r"|privacy (?:policy|notice)|scroll (?:down|to top)|loading(?:\.{3}|…))",
    # copyright
    r"(?:copyright ?)?© ?(?:copyright )?(?:19|20)\d\d\b.{0,120}"
    r"|copyright (?:\(c\) ?)?(?:19|20)\d\d(?:[-–](?:19|20)?\d\d)?,? "
    r"(?:by )?[^.]{2,50}(?:inc\.|ltd\.)?",
    # Chinese: cookies, JavaScript, accounts, navigation, copyright
    r"(?:本(?:网站|站|网页)|我们(?:的网站)?)(?:会)?使用\s?cookies?.*|接受(?:所有|全部)?\s?cookies?",
    r"(?:请|您需要|需要)?(?:先)?(?:启用|开启|打开|允许)(?:您?浏览器的?)?\s?javascript.{0,60}"
    r"|您?的?浏览器(?:不支持|已禁用|未启用)\s?javascript.{0,60}",
    r"(?:请)?(?:先)?登[录陆]后?(?:才能|再|即可|方可)?(?:发表)?(?:评论|回复|查看|发帖).{0,30}",
    r"(?:用户)?(?:登[录陆]|注册)(?:\s?[/|｜]\s?(?:登[录陆]|注册))?|(?:免费|立即)注册"
    r"|忘记密码[?？]?|没有账号[?？].{0,20}|已有账号[?？].{0,20}",
    r"(?:返回|回到)(?:顶部|首页|列表|目录|上一页)|[上下]一[页篇章条](?:[:：].{0,60})?"
    r"|(?:阅读全文|查看更多|查看全部|点击(?:查看|加载)更多|加载更多|展开全文|正在加载)(?:[>»…]|\.{3})*"
    r"|网站地图|网站首页|设为首页|加入收藏|友情链接[:：]?.{0,100}|分享到[:：]?.{0,60}|(?:微信)?扫一扫.{0,30}"
    r"|关注我们|关于我们|联系我们|免责声明|隐私政策|(?:用户|服务)协议|发表评论|我要评论",
    r"版权所有(?:[\s:：©,，(（].{0,100})?",
    # an address alone
    r"(?:https?://|www\.)[^\s\u3000-\u9fff]+",
)
_NOTICE = re.compile("|".join(f"(?:{pattern})" for pattern in _NOTICES), re.IGNORECASE)
# Notices known by a word that need not stand first, behind a pattern that finds it quickly.
_INNER_WORD = re.compile(r"rights reserved|ICP|公网安备|保留所有权利|版权所有", re.IGNORECASE)
_INNER = re.compile(
    r".{0,120}\ball rights reserved\.?(?: .{0,60})?"
    r"|.{0,60}(?:保留所有权利|版权所有[,，]?\s?(?:侵权必究|违者必究|翻印必究)).{0,40}"
    r"|.{0,40}[\u4e00-\u9fff]ICP[备证]\s?\d+号.{0,60}|.{0,40}公网安备\s?\d+号.{0,40}",
    re.IGNORECASE,
)

_SEPARATOR = re.compile(r"[|｜»›•·/>\t\u3000]|  ")
_BETWEEN_ITEMS = re.compile(r"\s*[|｜»›•·/]\s*|\s+>\s+|\t+| {2,}|\u3000+")
_MENU_ITEMS = frozenset(
    (
        *("home", "about", "about us", "contact", "contact us", "login", "log in", "sign in"),
        *("sign up", "logout", "log out", "register", "search", "help", "faq", "menu"),
        *("news", "blog", "privacy", "privacy policy", "terms", "terms of use"),
        *("terms of service", "sitemap", "site map", "support", "products", "services"),
        *("careers", "jobs", "press", "shop", "cart", "my account", "subscribe", "rss"),
        *("forum", "forums", "gallery", "events", "downloads", "archive", "archives"),
        *("cookies", "cookie policy", "advertise", "legal", "next", "previous", "prev"),
        *("english", "français", "deutsch", "español", "中文", "facebook", "twitter"),
        *("instagram", "youtube", "linkedin", "首页", "主页", "关于", "关于我们", "联系"),
        *("联系我们", "登录", "注册", "搜索", "帮助", "新闻", "新闻中心", "产品", "产品中心"),
        *("服务", "招聘", "加入我们", "下载", "论坛", "博客", "隐私政策", "网站地图"),
        *("会员中心", "购物车", "我的账户", "公司简介", "解决方案", "在线留言", "版权声明"),
        *("友情链接", "更多"),
    )
)


def is_boilerplate(line: str) -> bool:
    """Whether the whole line is a notice, navigation, a menu or an address of a web page."""
    line = line.strip()
    if not line or len(line) > _MOST_CHARACTERS:
        return False
    if _NOTICE.fullmatch(line) or (_SEPARATOR.search(line) and _is_menu(line)):
        return True
    return bool(_INNER_WORD.search(line) and _INNER.fullmatch(line))


def remove_boilerplate(text: str) -> tuple[str, list[str]]:
    """The text without such lines, and those lines; other lines keep their line ends."""
    kept, removed = [], []
    for line in text.splitlines(keepends=True):
        if is_boilerplate(line):
            removed.append(line)
        else:
            kept.append(line)
    return ("".join(kept), removed) if removed else (text, removed)


def _is_menu(line: str) -> bool:
    """Three or more short items, at least half of them usual ones of a menu."""
    items = [item for item in _BETWEEN_ITEMS.split(line) if item]
    if len(items) < 3 or max(map(len, items)) > 30:
        return False
    return sum(item.lower() in _MENU_ITEMS for item in items) * 2 >= len(items)
