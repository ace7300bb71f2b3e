"""The half that training never sees: other names, things, sentences, and layouts with their parts in another order."""

from __future__ import annotations

from .material import Material, lines, words

HELD_OUT = Material(
  first=words("""Agnes Albert Astrid Boris Cecilia Dora Edgar Esther Gloria Greta Hugo Ingrid Ivan Jasmine Kofi Liam Magnus Nora Olga
    Pablo Priya Quentin Ravi Stella Tobias Ursula Vera Walter Xavier Zoe"""),
  last=words("""Abbott Andersen Bauer Bishop Campbell Dalton Duarte Ferrari Fraser Grant Haas Huang Jacobs Kaya Larsen Lindgren Mendez
    Murphy Nakamura Okafor Olsen Petrov Quinn Ramos Santos Sharma Vargas Weber Wong Zimmerman"""),
  items=(
    "accordion", "bean bag", "cuckoo clock", "dartboard", "egg timer", "fondue set", "hot water bottle", "inflatable flamingo",
    "leaf blower", "mosquito net", "pepper mill", "piggy bank", "popcorn machine", "rowing machine", "salad spinner", "scarecrow",
    "skateboard", "snow globe", "trampoline", "trombone", "typewriter", "watering can", "weather vane", "wind chime",
  ),
  hello=lines("""
    Hey folks,
    Greetings!
    Dear customer service,
    Good afternoon,
    To whom it may concern,"""),
  bye=lines("""
    Warm wishes,
    Yours truly,
    With thanks,
    Take care,
    Respectfully,"""),
  chat=lines("""
    My parrot repeats my curses.
    I've shopped with you since 1998.
    Uncle Otto told me to write.
    The whole village knows by now.
    I'm typing this with 1 thumb.
    My therapist, Dr. Lund, suggested this mail.
    We've got 14 guests tonight.
    It's my 3rd attempt to reach you."""),
  layouts=(
    "{chat} My name's {name}, and regarding {order}: {ask}",
    "Re: {order}\nSender: {name}\n{ask}\n{bye}",
    "{hello} {name} speaking, purchase {order}. {ask}",
    "{ask}\n--\n{name}\n#{order}",
    "{order} / {name} / {ask} {chat}",
    "{hello}\n{ask}\n{bye}\n{name}\nP.S. The number's {order}.",
    "{ask} Filed under {name} (ref. {order}). {bye}",
  ),
  ask=dict(
    refund=lines("""
      The {item} cracked overnight, and I'd like every cent returned.
      Kindly put the price of the {item} back on my credit card.
      The {item} was a dud. How soon will you repay me?
      The {item} gave up within a day: a reimbursement is in order.
      You took too much from my bank for the {item}. Transfer the extra back.
      Your {item} is going back; wire me what it cost.
      Please reverse the payment, this {item} is useless.
      I demand my cash again, the {item} never even switched on."""),
    exchange=lines("""
      The {item} is the wrong shade: could I get a white one in its place?
      Mine is a medium {item}, yet I need a large. Is switching possible?
      The {item} has a loose screw, kindly post me a working one.
      I'd love to switch the {item} to the wooden kind.
      May I hand in the {item} and receive the next size up?
      Substitute the scratched {item} with an intact one, please.
      This {item} rattles. I'd be happy with a brand new one.
      You packed a child's {item}; mail the adult size, please."""),
    tracking=lines("""
      Ten days gone and the {item} still isn't here.
      Could you find out what happened to the package with my {item}?
      By what date should I expect the {item}?
      The {item} appears to be stuck at the depot.
      My neighbour got hers, yet my {item} never showed up.
      How far away is the {item} now?
      Did the {item} leave your warehouse already?
      The postman shrugs when asked about my {item}. Please locate it."""),
    cancel=lines("""
      I'd like to back out of buying the {item}.
      Don't dispatch the {item}: I've had second thoughts.
      Please void my purchase of the {item} while it's still with you.
      My toddler bought the {item} on my phone. Kindly annul it.
      There's no use for the {item} now. Don't mail it!
      Is it too late to pull out? I won't want the {item} after all.
      Never mind the {item}; please remove this purchase.
      I bought the {item} in my sleep. Abort before it goes out!"""),
    invoice=lines("""
      The tax office asks for papers on the {item}: could you email them?
      No receipt came along with the {item}; I'd appreciate one.
      Our bookkeeper is missing a document for the {item}.
      My employer covers the {item} if you put the price in writing.
      Kindly issue a VAT bill for the {item}.
      Would you email a duplicate of the sales slip for the {item}?
      Correct the firm's address on my {item} invoice, please.
      I deduct the {item} from taxes: a bill with today's date, please."""),
  ),
)
