"""Function words of a few languages: what nearly every running text has, and what says least about its subject."""

from __future__ import annotations

# The closed classes of each language: articles, pronouns, prepositions, conjunctions, auxiliary verbs, particles.
# Lower case. Negations are in: a rule that counts function words wants them; one that removes words has to spare them.
STOP_WORDS: dict[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "en": """
            a an the this that these those
            i me my mine we us our ours you your yours he him his she her hers it its they them their theirs
            myself yourself himself herself itself ourselves themselves
            who whom whose which what when where why how
            and or but if because while than though although whether unless until so as
            of at by for with about against between into through during before after above below to from in on off
            over under up down out within without upon
            am is are was were be been being have has had having do does did doing
            can could will would shall should may might must
            not no nor all any both each few more most other some such only own same too very just then there here
            also again once
        """,
        "zh": """
            的 了 着 过 地 得 之 吗 呢 吧 啊 呀 嘛
            我 你 您 他 她 它 我们 你们 他们 她们 它们 自己 咱们
            这 那 这个 那个 这些 那些 这里 那里 这样 那样 此 该 其 某
            谁 什么 怎么 怎样 哪 哪里 哪些 为什么 多少
            和 与 及 或 而 且 并 但 但是 以及 或者 而且 并且 不过 因为 所以 如果 虽然 然而 因此 由于 则 即 若
            在 于 从 向 到 对 把 被 让 给 以 为 由 对于 关于 根据 通过
            是 有 会 能 可以 可能 应该 就 也 都 还 又 再 很 更 最 太 已 已经 正在 将 只 才
            不 没 没有 个 们 所 等
        """,
        "de": """
            der die das den dem des ein eine einen einem einer eines kein keine keinen keinem keiner
            ich du er sie es wir ihr mich mir dich dir ihn ihm uns euch ihnen sich man
            mein meine dein deine sein seine seinen seiner ihre ihren ihrer unser unsere euer
            dieser diese dieses diesem diesen jener jede jeder jedes alle welcher welche welches
            wer was wann wo warum wie
            und oder aber denn sondern wenn weil dass ob als damit obwohl während bis
            in im an am auf aus bei beim mit nach von vom vor zu zum zur für durch gegen ohne um über unter zwischen
            bin ist sind war waren sein gewesen habe hat haben hatte hatten wird werden wurde wurden worden
            kann können konnte muss müssen soll sollen will wollen darf
            nicht nur auch noch schon sehr so dann da hier doch nun mehr
        """,
        "fr": """
            le la les l un une des du de d au aux ce cet cette ces ça c
            je j tu il elle on nous vous ils elles me m te t se s lui leur leurs y en moi toi eux
            mon ma mes ton ta tes son sa ses notre nos votre vos
            qui que qu quoi dont où quel quelle quels quelles quand comment pourquoi
            et ou mais donc or ni car si comme lorsque puisque afin
            à dans par pour sur sous avec sans entre vers chez contre depuis pendant avant après
            suis est sont était étaient être été ai a ont avait avaient avoir eu sera seront fait peut peuvent doit
            ne n pas plus très aussi tout tous toute toutes même encore déjà alors ainsi
        """,
        "es": """
            el la los las lo un una unos unas al del este esta estos estas ese esa esos esas eso esto aquel aquella
            yo tú él ella usted nosotros ellos ellas ustedes me te se nos le les mí sí
            mi mis tu tus su sus nuestro nuestra nuestros nuestras
            que qué quien quién cual cuál cuando cuándo donde dónde como cómo cuyo
            y e o u pero sino si porque pues aunque mientras
            a de en por para con sin sobre entre hasta desde hacia contra según durante ante
            soy es son era eran fue fueron ser sido está están estaba estar ha han había haber hay he
            puede pueden debe tiene tienen
            no ni ya muy más también todo todos toda todas otro otra otros otras así
        """,
    }.items()
}
"""Function words by language code."""
