"""The prompts of the leakage table: two passages written for it, of somewhat more than 224 tokens each.

They read like what people send to an assistant: names, numbers, repeated words. Nothing is quoted from anywhere.
"""

PASSAGES = (
    "Please summarise the following notes from our meeting on Tuesday. Maria opened by saying that the harbour "
    "office had asked for a new timetable before the end of March, because the ferry to the northern islands "
    "will not run while its engine is repaired. Daniel thought that two smaller boats could take its place, "
    "one in the morning and one in the evening, but he was worried about fuel, which had become eleven per "
    "cent dearer since last autumn. Everybody agreed that school children must be able to travel on weekdays. "
    "Maria will ask the ministry whether it pays for the additional crew, and Daniel will write to both "
    "captains. The second point was the leaking roof of the waiting room. A builder looked at it in January "
    "and offered to mend it for 4,300, but the offer ends on the fifteenth. Nobody was against accepting it, "
    "provided that the work is done before the first tourists come. Ruth asked that the minutes also mention "
    "the two complaints about the ticket machine, which takes coins and gives nothing back when it rains. The "
    "next meeting is in four weeks, at nine o'clock, in the small room on the second floor. Write no more than "
    "five sentences, keep the names and the dates, and say at the end who has to do what.",
    "My grandmother kept bees behind the mill, and when I was nine she let me hold a frame for the first time. "
    "She said that bees do not mind a person who moves slowly and thinks about something else. I thought about "
    "the river, and they walked over my gloves as if I were a tree. Years later I have six hives of my own, "
    "and this spring one of them is ill. The bees at its entrance tremble, they cannot fly, and in the morning "
    "there are dozens of them in the grass. The other five look healthy. I have fed all of them with the same "
    "syrup since February, two parts of sugar to one part of water, and I treated them against mites in "
    "October and again in December. The field beside the garden was sprayed nine days ago, but the farmer says "
    "that he did it after sunset and used nothing that harms insects. What should I look at first, and in "
    "which order? I own a microscope and can count mites on a white board, but I have never sent a sample to a "
    "laboratory and do not know how many bees they would need. Please also tell me whether I have to move the "
    "sick hive away from the others, or whether that would only spread it further, and what I should write in "
    "the book that the inspector reads when she comes in June.",
)
