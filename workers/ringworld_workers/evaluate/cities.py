"""The cities and numbers of needles: one set for evaluations, another for training documents.

A model that was trained on needles is asked for cities and numbers that it has never seen, so that
it can only have looked them up.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

EVALUATED = (
    "Accra Adelaide Algiers Amman Amsterdam Ankara Athens Auckland Bangkok Barcelona Beirut "
    "Belgrade Bergen Berlin Bogota Bologna Boston Brisbane Brussels Budapest Cairo Calgary "
    "Cardiff Caracas Chennai Chicago Cologne Copenhagen Cordoba Cusco Dakar Dallas Delhi Denver "
    "Dresden Dublin Edinburgh Florence Fukuoka Geneva Genoa Glasgow Granada Hamburg Hanoi Havana "
    "Helsinki Houston Istanbul Jakarta Johannesburg Kathmandu Kinshasa Krakow Kyiv Lagos Lahore "
    "Leipzig Lima Lisbon Ljubljana London Lyon Madrid Manila Marseille Melbourne Milan Montreal "
    "Mumbai Munich Nairobi Nantes Naples Osaka Oslo Ottawa Paris Perth Porto Prague Quito Riga "
    "Rome Rotterdam Santiago Sapporo Sarajevo Seattle Seoul Seville Shanghai Singapore Sofia "
    "Stockholm Sydney Taipei Tallinn Tbilisi Tokyo Toronto Toulouse Tunis Turin Valencia "
    "Vancouver Venice Verona Vienna Vilnius Warsaw Wellington Yerevan Yokohama Zagreb Zurich "
).split()
"""Cities of evaluations."""

TRAINED = (
    "Aarhus Aberdeen Abidjan Agra Aleppo Alicante Almaty Antwerp Arequipa Arles Asmara Astana "
    "Asuncion Atlanta Austin Avignon Baku Baltimore Bamako Bandung Basel Basra Beijing Belfast "
    "Belize Bern Bilbao Birmingham Bordeaux Boise Braga Bratislava Bremen Brest Bristol Brno "
    "Bruges Bucharest Bursa Busan Cadiz Cali Cambridge Canberra Cancun Casablanca Cebu Chengdu "
    "Cleveland Cluj Coimbra Colombo Columbus Cork Cuenca Curitiba Daegu Damascus Darwin Davao "
    "Detroit Dhaka Dijon Djibouti Doha Dortmund Dubai Dubrovnik Duisburg Dundee Durban Durham "
    "Dusseldorf Eindhoven Erfurt Essen Exeter Faro Ferrara Fez Frankfurt Freetown Fresno Galway "
    "Gaza Gdansk Ghent Gijon Goa Graz Grenoble Groningen Guangzhou Haifa Halifax Hangzhou "
    "Hannover Harare Harbin Hobart Honolulu Hyderabad Incheon Innsbruck Ipswich Isfahan Izmir "
    "Jaipur Jena Jerez Jodhpur Juba Kabul Kampala Kandy Karachi Kassel Kaunas Kazan Kiel Kigali "
    "Kingston Kobe Kochi Kosice Kumasi Kyoto Leeds Leiden Leon Lhasa Lille Limerick Linz "
    "Liverpool Lodz Lome Luanda Lublin Lucca Lusaka Luxor Lviv Macau Madurai Mainz Malaga Malmo "
    "Managua Manaus Manchester Mandalay Maputo Maribor Medan Medellin Memphis Mendoza Miami Minsk "
    "Mombasa Monaco Monterrey Montevideo Montpellier Mosul Murcia Muscat Mysore Nagoya Nagpur "
    "Nanjing Nashville Nassau Niamey Nice Nicosia Norwich Nottingham Nuremberg Oaxaca Odense "
    "Odessa Oran Orlando Orleans Ostrava Oulu Oviedo Oxford Padua Palermo Palma Panama Parma "
    "Patna Pecs Penang Perugia Phoenix Pisa Plovdiv Plymouth Portland Potsdam Poznan Pristina "
    "Puebla Pune Quebec Rabat Raleigh Ravenna Recife Reims Rennes Reykjavik Rimini Riyadh Rosario "
    "Rostock Rouen Salerno Salzburg Samara Santander Santos Saskatoon Segovia Sendai Sheffield "
    "Shiraz Siena Skopje Sousse Split Stavanger Strasbourg Stuttgart Sucre Surabaya Surat Suva "
    "Suzhou Szeged Tabriz Tampa Tampere Tangier Tashkent Thessaloniki Tianjin Tirana Toledo "
    "Toulon Tours Trento Trieste Tripoli Tromso Trondheim Tucson Tulsa Turku Ulm Uppsala Utrecht "
    "Vaduz Valletta Varna Verdun Vientiane Vigo Wuhan Xian Yangon York Zadar Zaragoza "
).split()
"""Cities of training documents; none is evaluated."""

EVALUATED_NUMBERS = 7
"""Numbers that this divides belong to evaluations, all others to training documents: whether it
does depends on every digit, so that no digit gives a training number away."""

_ONSETS = [
    *[""] * 4,
    *"b c ch d f g gh h j k kh l m n p ph qu r s sh t th v w y z".split() * 2,
    *"bl br cl cr dr fl fr gl gr kr pl pr sc sk sl sm sn sp st str sw tr tb".split(),
]
_VOWELS = [
    *"a e i o u".split() * 4,
    *"ai ao au ea ee ei eu ia ie io iu oo ou ua ue ui y".split(),
]
_CODAS = [
    *[""] * 12,
    *"b c ck d g gh h k l ll m n nd ng nk nn ns p r rd rg rs s ss st t th w x z".split(),
]
"""What syllables begin with, have and end with; what stands there more often comes more often."""
_LONGEST = 12
"""Letters of a made-up name: no evaluated city's has more."""


def draw_numbers(random_: random.Random, count: int, digits: int, evaluated: bool) -> list[str]:
    """Different numbers of so many digits, of an evaluation or of training documents.

    Args:
        random_: draws them.
        count: how many.
        digits: of each; the first is not 0.
        evaluated: whose.

    Raises:
        ValueError: there are not so many.
    """
    low, high = 10 ** (digits - 1), 10**digits
    if count > (high - low) // EVALUATED_NUMBERS // 2:
        raise ValueError(f"{count} different numbers of {digits} digits; allow more digits")
    found: dict[str, None] = {}
    while len(found) < count:
        number = random_.randrange(low, high)
        if (number % EVALUATED_NUMBERS == 0) == evaluated:
            found[str(number)] = None
    return list(found)


def draw_cities(random_: random.Random, count: int, made_up: float | None = None) -> list[str]:
    """Different cities.

    Args:
        random_: draws them.
        count: how many.
        made_up: share of made-up names among training documents' cities; None: of an evaluation.

    Raises:
        ValueError: there are not so many.
    """
    if made_up is None:
        if count > len(EVALUATED):
            raise ValueError(
                f"{count} needles of different cities, and there are {len(EVALUATED)} cities; hide "
                f"fewer"
            )
        return random_.sample(EVALUATED, count)
    found: dict[str, None] = {}
    new = _made_up(random_)
    while len(found) < count:
        real = random_.random() >= made_up and len(found) < len(TRAINED)
        found[random_.choice(TRAINED) if real else next(new)] = None
    return list(found)


def _made_up(random_: random.Random) -> Iterator[str]:
    """Names that are no evaluated city's, with letters in orders as varied as those of real ones.

    Half begin as one of the training cities and end as another; half are syllables. A model
    learns to write only what it is asked to write: a piece of a name that no training document
    asks for stays unwritten in an evaluation too.
    """
    taken = {name.lower() for name in EVALUATED}
    while True:
        if random_.random() < 0.5:
            first, last = random_.sample(TRAINED, 2)
            name = first[: random_.randint(2, len(first) - 1)]
            name += last[-random_.randint(1, len(last) - 1) :]
        else:
            name = "".join(
                random_.choice(_ONSETS) + random_.choice(_VOWELS) + random_.choice(_CODAS)
                for _ in range(random_.choice((1, 2, 2, 3)))
            ).capitalize()
        if 3 <= len(name) <= _LONGEST and name.lower() not in taken:
            yield name
