"""Pairs of a true answer and a response with the score that a person gives them, one a line: response -> score."""

LETTERS = """
B -> 1
b -> 1
(B) -> 1
(b) -> 1
[B] -> 1
B. -> 1
B) -> 1
B: -> 1
"B" -> 1
'B' -> 1
`B` -> 1
``B`` -> 1
**B** -> 1
**B.** -> 1
$B$ -> 1
\\boxed{B} -> 1
$\\boxed{\\text{B}}$ -> 1
<answer>B</answer> -> 1
B. left -> 1
B) left -> 1
(B) left -> 1
B: left -> 1
B, left -> 1
B - left -> 1
**B. left** -> 1
**B.** left -> 1
B left -> 1
B.left -> 1
b. left -> 1
B. Left. -> 1
B. the left -> 1
The answer is B -> 1
The answer is B. -> 1
The answer is b. -> 1
the answer is (B) -> 1
The answer is: B -> 1
The answer is **B** -> 1
The answer is B. left -> 1
The answer is option B. -> 1
The correct answer is B. -> 1
The correct option is B. -> 1
The correct choice is (B). -> 1
The best answer is B. -> 1
My answer is B. -> 1
My answer: B -> 1
Answer: B -> 1
Answer: (B) -> 1
**Answer:** B -> 1
**Answer**: B -> 1
Final answer: B -> 1
Final Answer: **B** -> 1
ANSWER: B -> 1
Answer = B -> 1
The answer should be B. -> 1
The answer would be B. -> 1
The answer must be B. -> 1
So, the answer is B. -> 1
Therefore, B. -> 1
So B. -> 1
Hence, the answer is B. -> 1
It is B. -> 1
It's B. -> 1
I choose B. -> 1
I pick B. -> 1
I would go with B. -> 1
I would select option B. -> 1
Option B -> 1
Option B. -> 1
option (B) -> 1
Choice B -> 1
B is correct. -> 1
B is the correct answer. -> 1
B is right. -> 1
B because it is nearer. -> 1
B, because it is nearer. -> 1
The lamp is nearer. Answer: B -> 1
The lamp is nearer (B). -> 1
The lamp is nearer, so the answer is B. -> 1
The answer is A. No, the answer is B. -> 1
The answer is not A, it is B. -> 1
A is wrong. B is correct. -> 1
答案是B -> 1
答案：B -> 1
A -> 0
(A) -> 0
A. -> 0
A. right -> 0
C -> 0
The answer is A. -> 0
The answer is C -> 0
Answer: D -> 0
Option C -> 0
I choose A. -> 0
A is correct. -> 0
B. right -> 0
(B) right -> 0
A or B -> 0
B or C -> 0
A and B -> 0
A/B -> 0
B is wrong. -> 0
B is not correct. -> 0
Not B. -> 0
A chair -> 0
A boat -> 0
I think so -> 0
I do not know -> 0
Be careful -> 0
Both -> 0
Because it is near -> 0
vitamin -> 0
banana -> 0
the box -> 0
"""  # the truth is "B. left"

CENTIMETRES = """
71 -> 1
71 cm -> 1
71cm -> 1
71 cm. -> 1
71.0 cm -> 1
+71 cm -> 1
about 71 cm -> 1
About 71 centimeters. -> 1
approximately 71 cm -> 1
roughly 71 centimetres -> 1
~71 cm -> 1
≈ 71 cm -> 1
around 71 -> 1
nearly 71 cm -> 1
71 or so -> 1
The answer is 71 cm. -> 1
Answer: 71 -> 1
**71** cm -> 1
**71 cm** -> 1
$71$ cm -> 1
\\boxed{71} -> 1
\\boxed{71\\text{ cm}} -> 1
<answer>71 cm</answer> -> 1
It is 71 cm wide. -> 1
It is 71 wide. -> 1
The chair is 71 cm from the table. -> 1
chair-2 is 71 cm away -> 1
The left one is 71 cm away. -> 1
The 2nd chair is 71 cm wide. -> 1
2 chairs, 71 cm apart -> 1
0.71 m -> 1
.71 m -> 1
0,71 m -> 1
0.71 meters -> 1
0.71 metres -> 1
0.71 meter -> 1
710 mm -> 1
710 millimeters -> 1
7.1 dm -> 1
0.00071 km -> 1
710,000 µm -> 1
7.1e1 cm -> 1
7.1e-1 m -> 1
7.1 x 10^2 mm -> 1
7.1 × 10^2 mm -> 1
7.1 \\times 10^{2} mm -> 1
28 in -> 1
28 in. -> 1
28 inches -> 1
28 inch -> 1
28" -> 1
28 inches tall -> 1
28 1/2 in -> 1
27 3/4 inches -> 1
27¾ inches -> 1
2.33 ft -> 1
2.33 foot -> 1
0.78 yard -> 1
710 millimetre -> 1
71 centimetre -> 1
0.00071 kilometre -> 1
2.33 feet -> 1
2 1/3 ft -> 1
2⅓ feet -> 1
2 ft 4 in -> 1
2 feet 4 inches -> 1
2 feet and 4 inches -> 1
2'4" -> 1
2′ 4″ -> 1
0.78 yards -> 1
0.78 yd -> 1
0.00044 miles -> 1
seventy-one centimeters -> 1
seventy one -> 1
two and a third feet -> 0
three quarters of a metre -> 1
seventy to seventy-two cm -> 1
70-72 cm -> 1
70 to 72 cm -> 1
70–72 cm -> 1
between 70 and 72 cm -> 1
from 70 to 72 cm -> 1
0.7 m to 0.72 m -> 1
71 ± 5 cm -> 1
69 -> 1
77 -> 1
79 -> 0
63 -> 0
-71 -> 0
-71 cm -> 0
71 m -> 0
71 mm -> 0
71 feet -> 0
71 ft -> 0
71 inches -> 0
71" -> 0
71 yards -> 0
71 km -> 0
71 degrees -> 0
71° -> 0
71 seconds -> 0
71 m2 -> 0
71 cm² -> 0
71 square centimeters -> 0
71% -> 0
71 kg -> 0
71 bananas -> 0
71 pixels -> 0
71 steps -> 0
1,071 cm -> 0
1,071 -> 0
0.71 -> 0
0.71 cm -> 0
50-90 cm -> 0
between 10 and 132 cm -> 0
more than 71 cm -> 0
less than 71 cm -> 0
at least 71 cm -> 0
up to 71 cm -> 0
> 71 cm -> 0
71 x 20 cm -> 0
71st -> 0
nan -> 0
inf -> 0
no idea -> 0
tall -> 0
about a metre -> 0
"""  # the truth is 71 cm, with a tolerance of a tenth

OTHERS = {
    ("number", 3, ""): "3 -> 1|three -> 1|3 chairs -> 1|There are 3. -> 1|There are three chairs. -> 1|3.0 -> 1|4 -> 0"
    "|3rd -> 0|2-4 -> 0|two or three -> 0|The one on the left. -> 0|a dozen -> 0|1/3 -> 0|6/2 -> 1",
    ("number", 0, ""): "0 -> 1|zero -> 1|none -> 1|None. -> 1|no idea -> 0|one -> 0",
    ("number", 1200, "mm"): "1,200 -> 1|1200 -> 1|1 200 mm -> 1|1.2e3 -> 1|1.2 m -> 1|1.200,0 mm -> 1|1.2 -> 0|12 -> 0"
    "|twelve hundred -> 1|one thousand two hundred -> 1",
    ("number", 12, "m2"): "12 m² -> 1|12 square meters -> 1|12 sq m -> 1|12 sqm -> 1|12 m^2 -> 1|129.17 sq ft -> 1"
    "|120000 cm2 -> 1|12 metres squared -> 1|12 m -> 0|12 m3 -> 0|129.17 square feet -> 1|12 -> 1|3 m x 4 m -> 0",
    ("number", 90, "degrees"): "90 -> 1|90° -> 1|90 º -> 1|90 deg -> 1|90 degrees -> 1|π/2 -> 1|pi/2 rad -> 1"
    "|1.5708 rad -> 1|1.5708 radians -> 1|0.25 turns -> 1|$90^\\circ$ -> 1|90 m -> 0|90 °C -> 0|ninety degrees -> 1"
    "|a quarter turn -> 1|-90 -> 0|1.5708 -> 0",
    ("number", 90, "s"): "90 -> 1|90 s -> 1|90 seconds -> 1|1.5 min -> 1|1.5 minutes -> 1|1 min 30 s -> 1|1:30 -> 1"
    "|one and a half minutes -> 1|1 minute and 30 seconds -> 1|90,000 ms -> 1|0.025 h -> 1|90 min -> 0|90 frames -> 0",
    (
        "number",
        2.5,
        "m",
    ): "2.5 -> 1|2.5 m -> 1|2 1/2 m -> 1|2½ m -> 1|two and a half metres -> 1|2 and a half meters -> 1"
    "|5/2 m -> 1|two point five metres -> 1|250 cm -> 1|8.2 ft -> 1|8 ft 2 in -> 1|25 -> 0|2,5 m -> 1|2.5m. -> 1",
    ("number", 0.5, "m"): "half a metre -> 1|.5 -> 1|1/2 m -> 1|½ m -> 1|half -> 1|a half -> 1|5 -> 0|50 cm -> 1",
    ("number", 2, "m/s"): "2 m/s -> 1|2 meters per second -> 1|7.2 km/h -> 1|7.2 kmh -> 1|2 m -> 0|2 -> 1",
    (
        "text",
        "A chair",
        None,
    ): "A chair -> 1|a chair -> 1|chair -> 1|The chair. -> 1|the answer is a chair -> 1|A table -> 0"
    "|A -> 0|A. -> 0|A. chair -> 0|The answer is A. -> 0|chairs -> 0",
    ("text", "null", None): "null -> 1|Null -> 1|None -> 0|0 -> 0",
    ("text", "None", None): "None -> 1|none -> 1|null -> 0",
    ("text", "1.50", None): "1.50 -> 1|1.5 -> 1|1.51 -> 0|150 -> 0|1.50 m -> 0",
    ("text", "2e3", None): "2e3 -> 1|2000 -> 1|2,000 -> 1|2e4 -> 0",
    ("text", "007", None): "007 -> 1|7 -> 0",
    ("text", 3.0, None): "3 -> 1|3.0 -> 1|three -> 1|30 -> 0",
    ("text", True, None): "true -> 1|True. -> 1|false -> 0|1 -> 0",
    ("text", ("two", "2"), None): "two -> 1|2 -> 1|three -> 0|['two', '2'] -> 0",
    ("text", "[40, 12,80,96]", None): "[40, 12,80,96] -> 1|[40,12,80,96] -> 1|[40, 12, 80] -> 0|40 -> 0",
    ("number", 1200.5, None): "1.200,5 -> 1|1,200.5 -> 1|1 200.5 -> 0|1200,5 -> 1|1.2005 -> 0",
    ("number", 1000, None): "10^3 -> 1|10**3 -> 1|$10^{3}$ -> 1|1 x 10^3 -> 1|1 \\times 10^3 -> 1|10 -> 0|2^3 -> 0",
    ("number", 2, "m"): "2^3 -> 0|2^3 m -> 0|10^2 cm x 2 -> 0|2 m² -> 0|2 m/s -> 0|2 kg -> 0|2 m ± 0.1 m -> 1|≈2m -> 1",
    ("number", 27, "in"): "2 ft 3 in -> 1|2 feet 3 inches -> 1|2'3\" -> 1|2 ft. 3 in. -> 1|2 ft -> 0|3 in -> 0",
    ("number", 71, "in"): "5'11\" -> 1|5′11″ -> 1|5 feet 11 inches -> 1|511 -> 0",
    ("number", 1.5, "m²"): "1.5 m² -> 1|1.5 m^2 -> 1|1.5 square metres -> 1|15000 cm² -> 1|1.5 m -> 0",
    ("number", 45, "°"): "45° -> 1|45 degrees -> 1|45º -> 1|$45^\\circ$ -> 1|0.785398 rad -> 1|-45° -> 0",
    ("number", -3, None): "minus 3 -> 1|−3 -> 1|-3 -> 1|3 -> 0|– 3 -> 1",
    ("number", 1, "m"): "100 cm -> 1|1000 mm -> 1|39.37 inches -> 1|1 yard -> 0|10 mph -> 0",
    ("number", 16.1, "km/h"): "10 mph -> 1|10 miles per hour -> 1|10 -> 0|16.1 km/h -> 1",
    ("number", 3, None): "３ -> 1|Ⅳ -> 0|There are 3 chairs. -> 1|3, not 4 -> 1|2 or 4 -> 0",
    ("choice", "A", None): "A -> 1|a -> 1|a. -> 1|A is my answer -> 1|It is A. -> 1|Answer: A -> 1|“A” -> 1|‘A’. -> 1"
    "|I think it is a chair -> 0|A chair -> 0|a chair -> 0|A or B -> 0|B and A -> 0|I -> 0|I see a chair -> 0"
    "|Not B, but A -> 1|not A but B -> 0|Both A and B -> 0|A is wrong. -> 0|The answer is not A. -> 0|答案：A -> 1",
    ("text", "3 m", None): "3 m -> 1|300 cm -> 1|3 metres -> 1|3 -> 0|3 ft -> 0",
}


def pairs() -> list[tuple[dict, str, float]]:
    """(checkable answer, response, score) of every line."""
    letters = {"type": "choice", "value": "B. left"}
    length = {"type": "number", "value": 71.0, "unit": "cm", "tolerance": 0.1}
    tables = [(letters, LETTERS.strip().split("\n")), (length, CENTIMETRES.strip().split("\n"))]
    for (kind, value, unit), lines in OTHERS.items():
        answer = {"type": kind, "value": list(value) if isinstance(value, tuple) else value}
        tables.append((answer | ({} if unit is None else {"unit": unit, "tolerance": 0.01}), lines.split("|")))
    return [
        (answer, response, float(expected))
        for answer, lines in tables
        for response, expected in (line.rsplit(" -> ", 1) for line in lines)
    ]
