from dynanet.report.markup import Markup, join, tag


def test_text_is_escaped_once_and_markup_never():
    inner = tag("b", "<&>")
    assert tag("p", inner, " & ", None, 3) == "<p><b>&lt;&amp;&gt;</b> &amp; 3</p>"
    assert tag("img", at={"alt": '" onerror="alert(1)', "src": None}) == '<img alt="&quot; onerror=&quot;alert(1)">'
    assert isinstance(join(["a", inner]), Markup)
    assert tag("p", "\x00\ud800") == "<p>\ufffd\ufffd</p>"


def test_elements_that_hold_nothing_have_no_end():
    assert tag("br") == "<br>" and tag("p") == "<p></p>"
    assert tag("td.a.b", at={"x": 2.0, "y": 1 / 3}) == '<td class="a b" x="2" y="0.33"></td>'
