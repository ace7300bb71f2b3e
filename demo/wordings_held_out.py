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
    Hey you lovely people!
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
    "{ask} Please answer to {name} (ref. {order}). {bye}",
  ),
  ask=dict(
    refund=lines("""
      I'd be glad to get my money for this {item} again; it split in two.
      After one use the {item} fell to bits. What about my money?
      Kindly refund the cost of our {item}, since it arrived soaked.
      Why is there no refund yet for the {item} we mailed back?
      You billed me double on that {item}. Return one payment.
      I'd like to be reimbursed: this {item} glows in the dark.
      We're not happy with our {item}, please repay us.
      Send our cash back, the {item} is a joke.
      Your {item} ruined our summer. We want a full refund.
      You took 80 euros instead of 8 for my {item}. Pay back the rest, please."""),
    delivery=lines("""
      We still haven't seen the {item}. Where could it be?
      Has anyone posted my {item}?
      The {item} should have come last Thursday.
      I keep waiting, but the {item} doesn't arrive.
      Which day will our {item} be brought?
      Tell me, where's the {item} travelling right now?
      Could you trace the parcel? It holds a {item}.
      Our {item} hasn't been delivered, says my wife.
      Two weeks of waiting for one {item}! When's it coming?
      Is there news about the shipping of our {item}?"""),
    cancel=lines("""
      Would you cancel the {item} we bought this morning.
      Please stop my {item} order, I was half asleep.
      We don't want the {item} any more, so don't ship it.
      Let's call off the {item}, our garden is flooded.
      My husband hates the {item}. Kindly drop it from the order.
      Sorry, that {item} was a mistake. Could you cancel?
      Don't send the {item}, I've changed my mind.
      I won't need a {item} in prison. Cancel, please.
      Undo my {item} purchase before it's packed.
      It isn't too late to withdraw my {item} order, is it?"""),
    invoice=lines("""
      I can't do my taxes without a bill for this {item}.
      Would you mail us the invoice? It's about one {item}.
      Our office needs the receipt showing the {item}.
      The {item} bill lists a wrong address. Please mend that.
      Is there a PDF invoice for this {item}?
      My accountant keeps asking for the {item} receipt.
      I'd like a bill, the {item} was for my company.
      Please issue a new invoice on the {item} with our VAT number.
      We never got any receipt with our {item}.
      Might I have proof of payment for this {item}? The boss insists."""),
  ),
)
