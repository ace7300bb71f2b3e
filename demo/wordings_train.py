"""The half that training sees."""

from __future__ import annotations

from .material import Material, lines, words

TRAIN = Material(
  first=words("""
    Adam Aisha Alan Alice Alma Amina Amir Amy Andrea Anil Anna Anton Arjun Arthur Baptiste Barbara Bella Ben Bernard Beth Bill Bjorn
    Brian Bruno Carl Carla Carlos Caroline Cedric Chidi Chloe Chris Clara Colin Craig Daisy Dalia Daniel David Deepak Dennis Diana
    Diego Dmitri Dylan Ebru Edith Edward Elena Elias Eliza Emeka Emil Emma Eric Erin Eva Farid Fatima Felix Fernando Fiona Frank Fred
    Freya Gabriel Gary George Gina Giovanni Grace Greg Gwen Hannah Harry Hassan Heidi Helen Henry Hilda Hiroshi Holly Igor Ikram Imani
    Ines Irene Iris Isaac Isla Jack Jade James Jane Jerome Jonas Jorge Jose Julia Jurgen Karen Karim Katarina Kate Ken Kevin Kim Kwame
    Lara Laura Leila Lena Leo Linda Ling Lionel Lisa Lorenzo Louis Lucas Lucy Malik Manuel Maria Mark Marta Max Mei Mia Miguel Mikael
    Mila Milan Mohamed Molly Nadia Naomi Neil Nick Nikolai Nina Noah Oksana Olivia Omar Oscar Ottavia Owen Patricia Paul Pavel
    Penelope Peter Philip Pierre Quincy Rachel Ralph Rashid Ricardo Rita Robert Roger Rohan Rosa Ruth Sam Samuel Sanjay Sara Saskia
    Sergei Shira Simon Siobhan Sofia Sonia Stefan Steve Susan Sven Tara Tariq Teresa Theo Thomas Tim Tina Tom Tomas Tony Tracy Ulrike
    Uma Umar Valentina Vanessa Victor Viktor Vincent Vivian Wanda Wei Wendy Wilhelm William Ximena Yara Yasmin Yolanda Yuki Yusuf
    Zachary Zara Zeynep"""),
  last=words("""
    Achebe Adams Aguilar Ali Allen Alvarez Archer Bailey Baker Banks Barnes Barros Becker Bell Bennett Berg Bianchi Black Blake
    Boateng Brooks Brown Burns Byrne Cameron Carter Castro Chan Chaudhry Chen Clark Cohen Cole Collins Cook Cooper Correia Costa Cox
    Cruz Davis Diaz Dixon Dubois Duncan Eaton Edwards Eriksson Evans Farouk Fernandez Fischer Fisher Fletcher Fontaine Ford Foster Fox
    Freeman Garcia Gibson Goldberg Gomez Gordon Graham Gray Greco Green Griffin Gupta Hakimi Hall Hamilton Hansen Harris Hart Hayashi
    Hayes Hill Hoffman Holmes Howard Hughes Hunter Ibrahim Ivanov Iversen Jackson Jankowski Jensen Johnson Jones Kane Keller Kelly
    Kennedy Khan Kimura King Klein Knight Koch Kowalski Kumar Lambert Lane Laurent Lawson Leclerc Lee Lewis Lin Lopez Marino Marshall
    Martin Mason Mbeki Meyer Miller Mitchell Moore Moreau Morgan Morris Mwangi Nelson Newman Nguyen Nilsson Novak Obrien Ojeda Ortiz
    Osman Owens Oyelaran Page Palmer Papadakis Parker Patel Pereira Perez Perry Phillips Popescu Porter Powell Price Rahman Reed Reyes
    Richter Rivera Roberts Rogers Romano Rossi Russo Ryan Sanders Sandoval Sato Schmidt Schneider Scott Shaw Silva Simpson Singh Smith
    Sokolov Stewart Stone Suzuki Takahashi Tanaka Taylor Thompson Torres Tran Turner Ueda Underwood Valdez Vasquez Virtanen Volkov
    Wagner Walker Wallace Ward Watson White Wilson Wright Xu Yang Yilmaz Young Zapata Zhang"""),
  items=(
    "alarm clock", "armchair", "banjo", "bathrobe", "bird house", "blender", "bookshelf", "camping stove", "candle holder",
    "coffee grinder", "desk lamp", "doormat", "electric kettle", "fish tank", "fountain pen", "garden gnome", "guitar", "hammock",
    "jigsaw puzzle", "juicer", "kite", "ladder", "lava lamp", "magnifying glass", "mirror", "music box", "paddling pool", "pasta maker",
    "picnic basket", "pillow", "raincoat", "rocking horse", "rug", "sewing machine", "shower curtain", "sleeping bag", "suitcase",
    "teapot", "telescope", "tent", "toaster", "umbrella", "vase", "waffle iron", "wall clock", "wool hat", "wheelbarrow", "yoga mat",
  ),
  hello=lines("""
    Hi,
    Hello,
    Hi there,
    Dear team,
    Good morning,
    Dear Sir or Madam,
    Hello support,
    Good evening,
    Hello!
    Good day.
    Hi all!
    Dear shop,"""),
  bye=lines("""
    Thanks,
    Best,
    Kind regards,
    Thank you,
    Cheers,
    Many thanks,
    Yours,
    Sincerely,"""),
  chat=lines("""
    My cat is furious.
    It has rained here for 3 weeks.
    I love your shop.
    I have been a customer since 2009.
    My friend Bob says hello.
    I am 82 and very patient.
    The neighbours are talking.
    I write from a train.
    My boss, Mr. Dupont, is watching.
    You have 2 days.
    No hurry at all.
    I had 4 coffees and no sleep.
    Please be kind, it is Monday.
    My 6 children are crying.
    Last time Doris helped me.
    Nice website, by the way."""),
  layouts=(
    "{hello}\n{ask} My order is {order}.\n{name}",
    "{ask} Order {order}. {bye} {name}",
    "{hello} this is {name}. {ask} Order number {order}.",
    "Order {order}: {ask}\n{bye}\n{name}",
    "I am {name} and my order is {order}. {ask}",
    "{hello} about order {order}. {chat} {ask} {bye} {name}",
    "Name: {name}\nOrder: {order}\n{ask}",
    "{ask} {chat}\n{name}, order {order}",
    "Subject: order {order}\n{hello} {ask}\n- {name}",
    "{name} here. {ask} {chat} It is order {order}.",
    "{hello} {ask} You will find it under {order}. {chat} {bye} {name}",
    "From: {name}\n{chat} {ask} (No. {order})",
    "{chat} {ask} Order: {order}, customer: {name}",
    "{hello} {chat} I ordered as {name}. {ask} {bye} your customer {order}",
    "Customer {name} writes: {ask} Order no. {order}",
    "{hello} {ask} Signed, {name}, order {order}",
    "{order}\n{ask}\n{name}",
    "{name}: {ask} {order}",
    "{ask} {bye} {name}\nOrder ID {order}",
    "Ticket for {name}, order {order}: {ask}",
    "Account: {name} | {ask} | Order: {order}",
    "{hello} {chat} {ask} In your books I am {name}, number {order}.",
    "{hello} {order} is mine, {name}. {ask}",
    "Order {order}, customer {name}. {hello} {ask}",
    "{name}, {order}. {hello} {ask}",
    "{hello} {ask} (registered to {name}, order {order})",
    "{hello} greetings from {name}! {ask} Reference {order}.",
    "{ask} {chat} Booked by {name} as {order}.",
    "{name} ({order}): {ask}",
    "[{order}] {hello} {ask} / {name}",
    "{hello} it is {name} again. {ask} Order {order}, as before.",
    "{ask} {bye} {name} ({order})",
    "To: support\nFrom: {name}\nOrder: {order}\n{hello} {ask}",
    "{ask} Placed under {order} by {name}.",
    "{hello} for order {order} placed by {name}: {ask} {bye}",
    "{order} - {hello} {ask} {bye} {name}",
    "Written by {name}. {chat} {ask} [{order}]",
    "Question on {order} from {name}. {hello} {ask}",
    "{hello} I, {name}, have a request. {ask} Order: {order}",
    "{name} | {order} | {hello} {ask}",
    "{ask} {chat} People call me {name}, you call me {order}.",
  ),
  ask=dict(
    refund=lines("""
      Please refund the {item}.
      I want my money back for the {item}.
      The {item} broke on day one, so return what I paid.
      The {item} leaks. Please reimburse me.
      Can you send the payment for the {item} back to my card?
      I sent the {item} back and the money is still not in my account.
      I was charged twice for the {item}; please pay one back.
      The {item} smells of fish. Refund, please.
      I will not pay for a {item} that never worked. Money back!
      Would you credit my account for the {item}? It fell apart.
      The {item} looks nothing like the photo, I expect a full refund.
      Half of the {item} was missing, so I would like to be paid back.
      My {item} died after 2 hours. Give me back my 40 euros.
      I returned the {item} on Monday. When do I see my cash?
      You charged too much for the {item}: please return the difference.
      The {item} is awful; undo the charge on my card.
      Could you pay me back for the {item}?
      The {item} was a gift that failed; where do I get my money?
      You promised me 25 euros for the {item} a week ago. Still nothing.
      I am unhappy with the {item} and ask for the full price again.
      The {item} arrived rotten. I expect the purchase price back.
      Please let me have the money for the {item}, it was not as described.
      The {item} cost me 60 dollars and lasted an hour. Repay it.
      My bank shows two payments for the {item}. One should come back to me.
      The {item} scared my horse. I send it back and get my money, right?
      Is a refund possible for a {item} that squeaks?
      I claim the amount paid for the {item}, as it was faulty.
      The discount on the {item} was not applied, so give me the 10 euros back.
      The {item} is rubbish. I would like to get reimbursed.
      Kindly transfer the sum for the {item} to my bank account.
      I paid for a {item} that is full of holes. Please repay me.
      Give me my money for the {item}, it burnt my table.
      When will the cash for my returned {item} arrive?
      I was billed two times for one {item}, so refund one of them.
      The {item} is faulty and I want compensation, not another one.
      What I spent on the {item} should go back to my wallet.
      How do I get reimbursed for the {item}? It melted.
      The {item} made us laugh, then cry. Money back, please.
      My card was debited for a {item} I never ordered. Please pay it back.
      I expect repayment for the {item}: it turned my bath green.
      The {item} cracked overnight, and I'd like every cent returned.
      Kindly put the price of the {item} back on my credit card.
      The {item} was a dud. How soon will you repay me?
      The {item} gave up within a day: a reimbursement is in order.
      You took too much from my bank for the {item}. Transfer the extra back.
      Your {item} is going back; wire me what it cost.
      Please reverse the payment, this {item} is useless.
      I demand my cash again, the {item} never even switched on.
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
      Where is my {item}?
      The {item} has not arrived yet.
      When will the {item} be delivered?
      I am still waiting for the {item}.
      Can you tell me where the parcel with the {item} is?
      The tracking page for my {item} has not moved since Monday.
      It has been 3 weeks and there is no {item} at my door.
      The courier says the {item} was delivered, but I have nothing.
      Has the {item} been shipped?
      My {item} seems lost in the mail.
      Do you know which day the {item} comes?
      The {item} was due on Friday. Any news of it?
      Please send me the tracking number of the {item}.
      The {item} is late, and the party is tomorrow.
      Is the {item} on its way?
      The driver left no {item} and no note. Where did it go?
      Any idea when the {item} gets here?
      I have been looking out of the window for the {item} all week.
      My {item} left your shop 9 days ago. Where is it now?
      Status of my {item}, please.
      Could you check the delivery of the {item}?
      Nobody has brought the {item} so far.
      The map shows my {item} at sea. Is that right?
      Will the {item} come today or tomorrow?
      The {item} should be here by now.
      Customs has had my {item} for a month. What is going on?
      My {item} was promised for Tuesday; how much longer?
      I paid for express, and yet the {item} is nowhere to be seen.
      The {item} is still not here after 12 days.
      What has become of the parcel with my {item}?
      On what date will my {item} reach me?
      I think the {item} is stuck somewhere. Can you look?
      Everybody has a parcel but me: no sign of my {item}.
      How long does the {item} still take?
      Did you send the {item} yet?
      The postman knows nothing about my {item}. Please find it.
      The {item} never came.
      I have waited 5 weeks for a {item}. When does it arrive?
      The package with the {item} went to the wrong town. Where is it today?
      Please let me know when the {item} is going to turn up.
      Ten days gone and the {item} still isn't here.
      Could you find out what happened to the package with my {item}?
      By what date should I expect the {item}?
      The {item} appears to be stuck at the depot.
      My neighbour got hers, yet my {item} never showed up.
      How far away is the {item} now?
      Did the {item} leave your warehouse already?
      The postman shrugs when asked about my {item}. Please locate it.
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
      Please cancel the {item}.
      I no longer need the {item}, do not send it.
      I ordered the {item} by mistake. Please stop the order.
      I changed my mind about the {item}; call it off.
      Can I still cancel the {item} before it ships?
      My dog ordered the {item}. Undo that order, please.
      Please do not ship the {item}.
      Take the {item} off my order, I do not want it any more.
      I found a {item} in the attic, so drop the order.
      Stop! I clicked on the {item} twice. Delete this order.
      Cancellation of the {item}, please, before it leaves.
      We move to a boat, no room for the {item}. Please cancel.
      Forget the {item}, my wife already has one.
      I want to withdraw my order of the {item}.
      Do not pack the {item}: the wedding is off.
      Please scrap the order, I will not need the {item}.
      Can you remove the {item} from my order list?
      I am no longer interested in the {item}. Please end the order.
      Please do not send me the {item} after all.
      The {item} is too expensive for me; cancel it before you charge me.
      I got the {item} as a present yesterday, so stop the delivery.
      I take back my order for the {item}.
      Kill the order of the {item}, please, nothing has shipped.
      We will not be needing the {item}. Please undo it.
      Could you halt the {item} before anybody packs it?
      The {item} was ordered in anger. I regret it, please cancel.
      Please ignore my order for the {item}.
      I decided against the {item}. Stop the shipment.
      I do not want to buy the {item} any longer.
      Please hold back the {item}, I have thought again.
      Annul the purchase of the {item}, please.
      My son ordered the {item} while I slept. Please call that off.
      The {item} is not needed now, so keep it.
      Is there time to cancel the {item}? I do not want it.
      Please delete my purchase of the {item}.
      I hit the button for the {item} with my elbow. Abort, please!
      Could you void the order for the {item}?
      Keep the {item} in your warehouse, I will not take it.
      I must step back from buying the {item}; we are broke.
      Please strike the {item} from my purchases.
      I'd like to back out of buying the {item}.
      Don't dispatch the {item}: I've had second thoughts.
      Please void my purchase of the {item} while it's still with you.
      My toddler bought the {item} on my phone. Kindly annul it.
      There's no use for the {item} now. Don't mail it!
      Is it too late to pull out? I won't want the {item} after all.
      Never mind the {item}; please remove this purchase.
      I bought the {item} in my sleep. Abort before it goes out!
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
      Please send me the invoice for the {item}.
      I need a receipt for the {item}.
      Could I get the bill for the {item} as a PDF?
      My accountant wants the paperwork for the {item}.
      The invoice of the {item} shows the wrong company name.
      I lost the receipt for the {item}, please mail a copy.
      There was no bill in the box with the {item}.
      For tax reasons I need the invoice for the {item}.
      Can you print the VAT number on the bill for the {item}?
      The {item} is for work: please make the invoice out to my firm.
      Please mail the proof of purchase for the {item}.
      The date on the receipt for the {item} is wrong.
      My boss will only pay for the {item} with an invoice in hand.
      Where can I download the bill of the {item}?
      An invoice, please! The {item} goes on expenses.
      Send a second copy of the bill for the {item}.
      I cannot find the bill for the {item}. Could you send it again?
      Please put my tax number on the receipt for the {item}.
      Customs wants to see an invoice for the {item}.
      May I have a written bill for the {item}?
      I need papers that show what the {item} cost.
      My insurance asks for the receipt of the {item}.
      You forgot the invoice when you sent the {item}.
      The name on the bill for the {item} has a typo: please fix it.
      I have to book the {item} in our accounts. Where is the document?
      Could the invoice for the {item} be in English?
      Please e-mail the billing statement for the {item}.
      The club pays for the {item}, but the treasurer wants a receipt.
      The tax people want a paper about the {item}. Please send it.
      The {item} came without a receipt; could you send one?
      Our accountant has no document for the {item}.
      I get the {item} paid by my company if I have the bill.
      Please write a bill with VAT for the {item}.
      A duplicate of the invoice for the {item}, please.
      The address on the {item} invoice is wrong, please correct it.
      I can deduct the {item} from my taxes. May I get the bill?
      Could you confirm in writing what I paid for the {item}?
      I need proof that I bought the {item}, with the price on it.
      Our finance office needs the bill of the {item} by noon.
      Kindly print me a receipt with the price of the {item}.
      The tax office asks for papers on the {item}: could you email them?
      No receipt came along with the {item}; I'd appreciate one.
      Our bookkeeper is missing a document for the {item}.
      My employer covers the {item} if you put the price in writing.
      Kindly issue a VAT bill for the {item}.
      Would you email a duplicate of the sales slip for the {item}?
      Correct the firm's address on my {item} invoice, please.
      I deduct the {item} from taxes: a bill with today's date, please.
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
