"""Scene captions in eight languages other than English, for the sample pool's language faults.

A language is its words and a few sentence patterns; patterns are chosen so that only shapes and numbers inflect.
"""

import random
from dataclasses import dataclass

from tasks.curation.scene import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, Group, Scene


@dataclass(frozen=True)
class _Language:
    """Words in the order of `COLOURS`, `BACKGROUNDS`, `SHAPES` and `POSITIONS`.

    A shape is how one of it and how several are written; `{m}` and `{f}` stand for the number in either gender.
    """

    colours: tuple[str, ...]
    backgrounds: tuple[str, ...]
    shapes: tuple[tuple[str, str], ...]
    masculine: tuple[str, str, str]
    feminine: tuple[str, str, str]
    positions: tuple[str, ...]
    group: str
    conjunction: str
    sentences: tuple[str, ...]


_LANGUAGES = {
    "fr": _Language(
        colours=("rouge", "orange", "jaune", "verte", "bleue", "violette", "noire", "blanche"),
        backgrounds=("blanc", "gris", "noir", "beige", "rose", "bleu clair"),
        shapes=(
            *(("un cercle", "{m} cercles"), ("un carré", "{m} carrés"), ("un triangle", "{m} triangles")),
            *(("une étoile", "{f} étoiles"), ("une croix", "{f} croix"), ("un anneau", "{m} anneaux")),
        ),
        masculine=("deux", "trois", "quatre"),
        feminine=("deux", "trois", "quatre"),
        positions=(
            *("au milieu", "à gauche", "à droite", "en haut", "en bas"),
            *("en haut à gauche", "en haut à droite", "en bas à gauche", "en bas à droite"),
        ),
        group="{shapes} de couleur {colour} {place}",
        conjunction=" et ",
        sentences=(
            "Sur cette image, on voit {groups}, devant un fond {background}.",
            "Un dessin avec {groups} ; le fond est {background}.",
        ),
    ),
    "de": _Language(
        colours=("Rot", "Orange", "Gelb", "Grün", "Blau", "Violett", "Schwarz", "Weiß"),
        backgrounds=("weiß", "grau", "schwarz", "beige", "rosa", "hellblau"),
        shapes=(
            *(("einen Kreis", "{m} Kreise"), ("ein Quadrat", "{m} Quadrate"), ("ein Dreieck", "{m} Dreiecke")),
            *(("einen Stern", "{m} Sterne"), ("ein Kreuz", "{m} Kreuze"), ("einen Ring", "{m} Ringe")),
        ),
        masculine=("zwei", "drei", "vier"),
        feminine=("zwei", "drei", "vier"),
        positions=(
            *("in der Mitte", "auf der linken Seite", "auf der rechten Seite", "oben", "unten"),
            *("oben links", "oben rechts", "unten links", "unten rechts"),
        ),
        group="{shapes} in {colour} {place}",
        conjunction=" und ",
        sentences=(
            "Auf dem Bild sieht man {groups}, und der Hintergrund ist {background}.",
            "Die Zeichnung zeigt {groups}; der Hintergrund ist {background}.",
        ),
    ),
    "es": _Language(
        colours=("rojo", "naranja", "amarillo", "verde", "azul", "morado", "negro", "blanco"),
        backgrounds=("blanco", "gris", "negro", "beige", "rosa", "azul claro"),
        shapes=(
            *(("un círculo", "{m} círculos"), ("un cuadrado", "{m} cuadrados")),
            *(("un triángulo", "{m} triángulos"), ("una estrella", "{f} estrellas")),
            *(("una cruz", "{f} cruces"), ("un anillo", "{m} anillos")),
        ),
        masculine=("dos", "tres", "cuatro"),
        feminine=("dos", "tres", "cuatro"),
        positions=(
            *("en el centro", "a la izquierda", "a la derecha", "en la parte de arriba", "en la parte de abajo"),
            *("arriba a la izquierda", "arriba a la derecha", "abajo a la izquierda", "abajo a la derecha"),
        ),
        group="{shapes} de color {colour} {place}",
        conjunction=" y también ",
        sentences=(
            "En esta imagen hay {groups}, sobre un fondo {background}.",
            "El dibujo muestra {groups}, y el fondo es {background}.",
        ),
    ),
    "it": _Language(
        colours=("rosso", "arancione", "giallo", "verde", "blu", "viola", "nero", "bianco"),
        backgrounds=("bianco", "grigio", "nero", "beige", "rosa", "azzurro"),
        shapes=(
            *(("un cerchio", "{m} cerchi"), ("un quadrato", "{m} quadrati"), ("un triangolo", "{m} triangoli")),
            *(("una stella", "{f} stelle"), ("una croce", "{f} croci"), ("un anello", "{m} anelli")),
        ),
        masculine=("due", "tre", "quattro"),
        feminine=("due", "tre", "quattro"),
        positions=(
            *("al centro", "a sinistra", "a destra", "in alto", "in basso"),
            *("in alto a sinistra", "in alto a destra", "in basso a sinistra", "in basso a destra"),
        ),
        group="{shapes} di colore {colour} {place}",
        conjunction=" e anche ",
        sentences=(
            "In questa immagine si vede il disegno di {groups}, su uno sfondo {background}.",
            "Il disegno mostra {groups}, e lo sfondo è {background}.",
        ),
    ),
    "ru": _Language(
        colours=(
            *("красного", "оранжевого", "жёлтого", "зелёного"),
            *("синего", "фиолетового", "чёрного", "белого"),
        ),
        backgrounds=("белый", "серый", "чёрный", "бежевый", "розовый", "голубой"),
        shapes=(
            *(("один круг", "{m} круга"), ("один квадрат", "{m} квадрата")),
            *(("один треугольник", "{m} треугольника"), ("одна звезда", "{f} звезды")),
            *(("один крест", "{m} креста"), ("одно кольцо", "{m} кольца")),
        ),
        masculine=("два", "три", "четыре"),
        feminine=("две", "три", "четыре"),
        positions=(
            *("в центре", "слева", "справа", "сверху", "снизу"),
            *("слева сверху", "справа сверху", "слева снизу", "справа снизу"),
        ),
        group="{shapes} {colour} цвета {place}",
        conjunction=" и ещё ",
        sentences=("На этой картинке мы видим: {groups}, а фон здесь {background}.",),
    ),
    "zh": _Language(
        colours=("红色", "橙色", "黄色", "绿色", "蓝色", "紫色", "黑色", "白色"),
        backgrounds=("白色", "灰色", "黑色", "米色", "粉色", "浅蓝色"),
        shapes=(
            *(("一个{colour}的圆形", "{m}个{colour}的圆形"), ("一个{colour}的正方形", "{m}个{colour}的正方形")),
            *(("一个{colour}的三角形", "{m}个{colour}的三角形"), ("一颗{colour}的星星", "{m}颗{colour}的星星")),
            *(("一个{colour}的十字", "{m}个{colour}的十字"), ("一个{colour}的圆环", "{m}个{colour}的圆环")),
        ),
        masculine=("两", "三", "四"),
        feminine=("两", "三", "四"),
        positions=("中间", "左边", "右边", "上面", "下面", "左上角", "右上角", "左下角", "右下角"),
        group="{place}有{shapes}",
        conjunction="，",
        sentences=("这张图片的背景是{background}的，{groups}。", "我们可以看到图片的{groups}，背景是{background}的。"),
    ),
    "ja": _Language(
        colours=("赤い", "オレンジ色の", "黄色い", "緑色の", "青い", "紫色の", "黒い", "白い"),
        backgrounds=("白", "灰色", "黒", "ベージュ", "ピンク", "水色"),
        shapes=(
            *(("円が一つ", "円が{m}"), ("四角が一つ", "四角が{m}"), ("三角形が一つ", "三角形が{m}")),
            *(("星が一つ", "星が{m}"), ("十字が一つ", "十字が{m}"), ("輪が一つ", "輪が{m}")),
        ),
        masculine=("二つ", "三つ", "四つ"),
        feminine=("二つ", "三つ", "四つ"),
        positions=("真ん中", "左側", "右側", "上の方", "下の方", "左上", "右上", "左下", "右下"),
        group="{place}に{colour}{shapes}",
        conjunction="、そして",
        sentences=("この絵の背景は{background}で、{groups}描かれています。",),
    ),
    "ar": _Language(
        colours=("الأحمر", "البرتقالي", "الأصفر", "الأخضر", "الأزرق", "البنفسجي", "الأسود", "الأبيض"),
        backgrounds=("بيضاء", "رمادية", "سوداء", "بيج", "وردية", "زرقاء فاتحة"),
        shapes=(
            *(("واحدة من الدوائر", "{f} من الدوائر"), ("واحد من المربعات", "{m} من المربعات")),
            *(("واحد من المثلثات", "{m} من المثلثات"), ("واحدة من النجوم", "{f} من النجوم")),
            *(("واحد من الصلبان", "{m} من الصلبان"), ("واحدة من الحلقات", "{f} من الحلقات")),
        ),
        masculine=("اثنان", "ثلاثة", "أربعة"),
        feminine=("اثنتان", "ثلاث", "أربع"),
        positions=(
            *("في الوسط", "على اليسار", "على اليمين", "في الأعلى", "في الأسفل"),
            *("في أعلى اليسار", "في أعلى اليمين", "في أسفل اليسار", "في أسفل اليمين"),
        ),
        group="{shapes} باللون {colour} {place}",
        conjunction=" وكذلك ",
        sentences=("في هذه الصورة {groups} على خلفية {background}.",),
    ),
}
LANGUAGES = tuple(_LANGUAGES)
"""The languages `describe_in` knows, as ISO 639-1 codes."""


def describe_in(language: str, scene: Scene, rng: random.Random) -> str:
    """A caption of `scene` in one of `LANGUAGES`; raises `KeyError` for another."""
    words = _LANGUAGES[language]
    groups = words.conjunction.join(_group(words, group) for group in scene.groups)
    background = words.backgrounds[list(BACKGROUNDS).index(scene.background)]
    return rng.choice(words.sentences).format(groups=groups, background=background)


def _group(words: _Language, group: Group) -> str:
    one, several = words.shapes[SHAPES.index(group.shape)]
    colour = words.colours[list(COLOURS).index(group.colour)]
    if group.count == 1:
        shapes = one.format(colour=colour)
    else:
        masculine, feminine = words.masculine[group.count - 2], words.feminine[group.count - 2]
        shapes = several.format(colour=colour, m=masculine, f=feminine)
    place = words.positions[list(POSITIONS).index(group.position)]
    return words.group.format(shapes=shapes, colour=colour, place=place)
