"""Words for the values of requests; of a kind, the training and the evaluation pool share none.

Most values are put together from two or three lists: there are too many to remember, so that a model is better off
copying. First words are common ones, which a tokenizer cuts the same way after a space and after a quotation mark.
"""

from __future__ import annotations

from typing import Literal

Split = Literal["train", "eval"]
Pool = dict[str, list[str]]


def _pool(train: str, evaluation: str) -> Pool:
    def words(text: str) -> list[str]:
        return [word.strip() for word in text.replace("\n", " ").split(",")]

    return {"train": words(train), "eval": words(evaluation)}


FIRST_NAMES = _pool(
    """Alice, Bob, John, David, James, Paul, William, Mark, Tim, Ben, Tom, Mary, Frank, George, Sam, Peter, Charles,
    Sarah, Michael, Thomas, Daniel, Adam, Joseph, Jack, Jane, Scott, Carl, Matt, Fred, Victor, Jim, Ken, Anna, Marie,
    Emily, Alexander, Edward, Stephen, Jacob, Chris, Josh, Neil, Samuel, Nick, Maya, Leon, Bill, Max, Rose, Louis, Clara,
    Felix, Grace, Kate, Olivia, Rachel, Diana, Ivan, Laura, Nadia""",
    """Alex, Robert, Henry, Richard, Martin, Matthew, Luke, Maria, Anne, Elizabeth, Andrew, Simon, Jamie, Lily, Greg,
    Jeff, Arthur, Hope""",
)
LAST_NAMES = _pool(
    """Abbott, Baker, Carter, Evans, Fischer, Garcia, Hughes, Jensen, Keller, Lopez, Mason, Olsen, Parker, Quinn, Rossi,
    Schmidt, Turner, Vargas, Watson, Young, Adler, Brooks, Costa, Dixon, Ellis, Ford, Gomez, Hill, Jordan, King, Lambert,
    Morris, Nash, Price, Reed, Silva, Walsh, Berg, Cooper, Fox""",
    """Anderson, Bell, Clark, Diaz, Foster, Graham, Harper, Jackson, Klein, Lewis, Murray, Nelson, Perry, Ross, Stone,
    White, Moore, Hansen""",
)
PLACE_FIRST = _pool(
    """Golden, Blue, Royal, Green, Silver, Happy, Red, Wild, Black, Grand, Secret, Northern, Eastern, Brown, Sweet, Fair,
    Holy, Open, Free, Rich, Big, Deep, Light, Hot, First, Modern, Urban, Lucky, Copper, Velvet, Crystal""",
    "Little, White, Old, Southern, Yellow, Western, Quick, Cool, Double, Young, Second, Ancient, Local",
)
PLACE_SECOND = _pool(
    """Door, Garden, Lion, Table, Dragon, Spoon, Kitchen, River, Anchor, Tiger, Corner, Oven, Fox, Palace, Bridge, Olive,
    Crown, Barrel, Lantern, Plate, Turtle, Harbour, Mill, Fork, Lake""",
    "Horse, Tower, Pepper, Elephant, Basket, Castle, Mountain, Rabbit, Window, Station, Rose, Whale",
)
CITIES = _pool(
    """London, Paris, Boston, Rome, Oxford, Washington, Lincoln, China, Japan, Canada, Mexico, Italy, Brazil, Russia, Egypt,
    Australia, Texas, Virginia, France, Britain, Israel, Hungary, Berlin, Madrid, Vienna, Sydney, Tokyo, Moscow, New York,
    New Jersey, San Diego, San Jose, Los Angeles, South Africa, North Carolina, Port Louis, Green Bay, Little Rock""",
    "Chicago, Cambridge, Madison, Spain, India, Pakistan, California, Florida, Germany, England, New Zealand, South Korea",
)
SIZES = _pool(
    """large, small, hot, cold, fresh, green, red, white, sweet, mixed, plain, dry, mini, extra, thick, big, regular, simple,
    classic, soft, full, long, local, winter""",
    "black, double, light, wild, thin, little, special, warm, fried, short, summer, medium",
)
DISHES = _pool(
    """chicken, tomato, mushroom, pumpkin, beef, salmon, cheese, potato, spinach, shrimp, coconut, pork, lemon, bean, duck,
    carrot, turkey, noodle""",
    "lamb, vegetable, tuna, onion, seafood, pepper, bacon, apple, crab",
)
FORMS = _pool(
    "soups, pizzas, salads, sandwiches, pies, burgers, wraps, stews, bowls, rolls, plates, toasts",
    "pastas, cakes, curries, pancakes, platters, omelettes",
)
EXTRAS = _pool(
    """rice, milk, egg, bread, corn, beans, nuts, salt, sugar, ice, fruit, wine, ham, seeds, orange, jam, wheat, cream,
    butter, garlic, olives, ginger, honey, sauce, mustard""",
    "fish, meat, lime, peas, berries, oil, dates, fat",
)
SEATS = _pool(
    """the bar, the door, the kitchen, the window, the garden, the basement, the toilets, the stage, the stairs,
    the hallway, the fireplace, the speakers, the entrance, the corridor, the counter""",
    "the terrace, the balcony, the courtyard, the piano, the roof, the elevator, the aquarium",
)
REASONS = _pool(
    """rent, gas, books, water, the tickets, the taxi, the concert, the hotel, the gift, the repair, the flowers,
    the deposit, the trip, the internet, the dentist, the painting, the camera, the photos, the dinner, the coffee,
    the shoes, the bicycle, the lesson, the phone""",
    """food, fuel, the electricity, the furniture, the insurance, the haircut, the parking, the museum, the laptop,
    the wedding, the snacks, the cleaning""",
)
TASK_VERBS = _pool(
    "call, email, thank, pay, visit, text, pick up, wait for, write to, ask about, look for, help",
    "contact, answer, collect, check on, talk to, follow",
)
TASK_OBJECTS = _pool(
    """the dentist, the landlord, the plumber, my mother, the bank, the school, the gardener, the neighbours, my boss,
    the doctor, the new tenant, the hotel, the driver, the bakery, the team, the lawyer, my uncle, the florist,
    the painter, the coach""",
    "the electrician, my sister, the librarian, the accountant, the mechanic, my cousin, the pharmacist, the cleaner",
)
TITLE_FIRST = _pool(
    """Silver, Summer, Paper, Winter, Golden, Secret, Electric, Dark, Cold, Easy, Long, Empty, Digital, River, Forest,
    Monday, Fire, Moon, Running, Walking, Missing, Slow, Strong, Soft, Midnight, Broken, Burning""",
    "Sunday, Spring, Magic, Ocean, Stone, Friday, Snow, Star, Living, Moving, Fast, Atlantic, Iron",
)
TITLE_SECOND = _pool(
    """Rain, Dreams, Road, Hearts, Light, Lights, Train, Letters, Stars, Echo, Garden, Shadows, Mirror, Bells, City, Wings,
    Whispers, Games, Nights, Machine""",
    "Thunder, Mountains, Birds, Highway, Island, Flowers, Window, Sky, Promise, Sand",
)
BANDS = _pool(
    """Foxes, Wolves, Pilots, Strangers, Poets, Kings, Sisters, Sailors, Robots, Rivals, Tigers, Dreamers, Cowboys,
    Shadows, Neighbours, Diamonds, Bandits, Comets, Orphans, Painters""",
    "Giants, Farmers, Pirates, Eagles, Lovers, Magnets, Soldiers, Planets, Brothers, Travellers",
)
VERSIONS = _pool(
    """live versions, covers, radio edits, long versions, old recordings, news, ads, metal versions, pop songs,
    organ versions, samples, rap songs, clips, talk""",
    "short clips, extended cuts, new versions, folk songs, slow songs, classical music, stories",
)
WEATHER_PARTS = _pool(
    """the wind, the humidity, the pressure, the pollen, the sunrise, the tides, the clouds, the ice, the dew point,
    the air quality, the visibility, the lightning""",
    "the snow, the sunset, the fog, the moonrise, the rainfall, the heat index",
)
