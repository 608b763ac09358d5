from collections.abc import Callable
from dataclasses import replace

import pytest
from tiny_runs import TinyRun, outcome_of

from jobs.dispatcher import Dispatcher
from jobs.errors import RunError
from pipeline.journal import Journal
from pipeline.records import Shard, Status

MakeRun = Callable[..., TinyRun]


@pytest.fixture
def run(make_run: MakeRun) -> TinyRun:
    return make_run(["a.png", "b.png", "c.png"], per_shard=2)


def get_one_done(dispatcher: Dispatcher, number: int) -> None:
    """Has a worker finish the next shard, which has one image."""
    assignment = dispatcher.take(number, {number: "here"})
    assert assignment is not None
    shard = assignment.shard
    dispatcher.report(shard.shard_id, [outcome_of(shard.images[0], shard.shard_id)])
    dispatcher.done(shard.shard_id)


def test_shards_go_out_in_order_and_once(run: TinyRun) -> None:
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None)
    first, second = dispatcher.take(0, {0: "here"}), dispatcher.take(0, {0: "here"})
    assert first is not None
    assert second is not None
    assert [a.shard.shard_id for a in (first, second)] == ["s000", "s001"]
    assert dispatcher.take(0, {0: "here"}) is None
    assert not dispatcher.is_finished
    dispatcher.done("s000")
    dispatcher.done("s001")
    assert dispatcher.is_finished


def test_a_death_makes_the_next_attempt_careful_and_a_lost_machine_does_not(run: TinyRun) -> None:
    dispatcher = Dispatcher(run.shards[:1], run.context, lambda rows: None)
    attempts = []
    for end in (dispatcher.give_back, lambda shard: dispatcher.died(shard, "SIGKILL", "log"), dispatcher.give_back):
        assignment = dispatcher.take(0, {0: "here"})
        assert assignment is not None
        attempts.append(assignment.attempt)
        end("s000")
    assignment = dispatcher.take(0, {0: "here"})
    assert assignment is not None
    assert [*attempts, assignment.attempt] == [1, 1, 2, 2]


def test_a_lost_machine_blames_no_image(run: TinyRun) -> None:
    dispatcher = Dispatcher(run.shards[:1], run.context, lambda rows: None)
    dispatcher.take(0, {0: "here"})
    Journal(run.directory.journal_dir, "s000").begin("a")
    dispatcher.give_back("s000")
    assert Journal(run.directory.journal_dir, "s000").count_death() is None


def test_a_shard_over_which_machines_are_lost_goes_last_with_care_until_losses_count_as_deaths(
    run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None)
    taken, blamed = [], []
    for _ in range(5):
        assignment = dispatcher.take(0, {0: "here"})
        assert assignment is not None
        if assignment.shard.shard_id == "s001":
            taken.append("s001")
            dispatcher.done("s001")
            assignment = dispatcher.take(0, {0: "here"})
            assert assignment is not None
        taken.append(f"{assignment.shard.shard_id}, attempt {assignment.attempt}")
        Journal(run.directory.journal_dir, "s000").begin("takes its machine with it")
        dispatcher.machine_lost("s000", "log")
        blamed.append(Journal(run.directory.journal_dir, "s000").has_in_flight)
    assert taken[:4] == ["s000, attempt 1", "s000, attempt 1", "s001", "s000, attempt 2"]
    assert blamed == [False, False, False, False, True]
    told = [record.getMessage() for record in caplog.records]
    assert told[:4] == ["the machine of worker 0 was lost, over shard s000: see log"] * 4


def test_machines_lost_over_a_shard_that_gets_on_count_for_nothing(run: TinyRun) -> None:
    dispatcher = Dispatcher(run.shards[:1], run.context, lambda rows: None)
    attempts = []
    for ref in run.shards[0].images:
        assignment = dispatcher.take(0, {0: "here"})
        assert assignment is not None
        attempts.append(assignment.attempt)
        dispatcher.report("s000", [outcome_of(ref, "s000")])
        dispatcher.machine_lost("s000", "log")
    assert attempts == [1, 1]


def test_what_an_ended_run_had_in_hand_is_not_blamed(run: TinyRun) -> None:
    Journal(run.directory.journal_dir, "s000").begin("a")
    Dispatcher(run.shards, run.context, lambda rows: None)
    assert Journal(run.directory.journal_dir, "s000").count_death() is None


def test_workers_that_cannot_start_end_the_run_with_the_log(run: TinyRun) -> None:
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None)

    def fail(number: int) -> None:
        dispatcher.start_failed(number, "SIGKILL", "logs/worker-0.log", others_work=False)

    fail(0)
    fail(0)
    dispatcher.worker_ready(0)
    fail(0)
    fail(1)
    with pytest.raises(RunError, match=r"3 workers in a row.*SIGKILL.*logs/worker-0\.log"):
        fail(0)


def test_a_worker_that_cannot_start_is_given_up_while_others_work(run: TinyRun) -> None:
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None)
    dispatcher.worker_ready(0)
    for _ in range(3):
        assert dispatcher.is_of_use(1)
        dispatcher.start_failed(1, "SIGKILL", "log", others_work=True)
    assert not dispatcher.is_of_use(1)
    assert dispatcher.is_of_use(0)


def test_a_shard_that_is_done_reports_its_own_images_only(make_run: MakeRun) -> None:
    run = make_run(["a.png", "b.png", "c.png"], per_shard=3)
    (shard,) = run.shards
    run.directory.commit_part("s000", [outcome_of(ref, "s000") for ref in shard.images])
    reported: list[str] = []
    dispatcher = Dispatcher(
        [Shard("s000", shard.images[2:])], run.context, lambda rows: reported.extend(each.image_id for each in rows)
    )
    dispatcher.take(0, {0: "here"})
    dispatcher.done("s000")
    assert reported == [shard.images[2].image_id]


def test_a_worker_that_lives_and_fails_again_and_again_ends_the_run(run: TinyRun) -> None:
    dispatcher = Dispatcher(run.shards[:1], run.context, lambda rows: None)
    Journal(run.directory.journal_dir, "s000").begin("held by a process that cannot be ended")
    for _ in range(2):
        dispatcher.take(0, {0: "here"})
        dispatcher.failed("s000", "ValueError", "log")
    dispatcher.take(0, {0: "here"})
    with pytest.raises(RunError, match="s000 made no headway in 3 attempts"):
        dispatcher.failed("s000", "ValueError", "log")


def test_a_shard_that_another_process_holds_is_no_workers_fault_and_ends_the_run_after_all_else(
    make_run: MakeRun,
) -> None:
    run = make_run([f"{number}.png" for number in range(6)], per_shard=1)
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None, workers=2)
    done, attempts = list[str](), list[int]()

    def work_all_off() -> None:
        while (assignment := dispatcher.take(0, {0: "here", 1: "here"})) is not None:
            shard_id = assignment.shard.shard_id
            if shard_id == "s000":
                attempts.append(assignment.attempt)
                dispatcher.busy(shard_id, "held by another process (s000.lock)", "log")
                assert dispatcher.is_of_use(0)
            else:
                done.append(shard_id)
                dispatcher.report(shard_id, [outcome_of(assignment.shard.images[0], shard_id)])
                dispatcher.done(shard_id)

    with pytest.raises(RunError, match=r"s000 made no headway in 3 attempts in a row: held by .*\.lock"):
        work_all_off()
    assert done == [f"s00{number}" for number in range(1, 6)]
    assert attempts == [1, 1, 1]


def test_a_worker_that_fails_shard_after_shard_gets_no_more_and_the_others_go_on(make_run: MakeRun) -> None:
    run = make_run([f"{number}.png" for number in range(6)], per_shard=1)
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None, workers=2)
    for _ in range(3):
        assert dispatcher.is_of_use(0)
        assignment = dispatcher.take(0, {0: "here"})
        assert assignment is not None
        dispatcher.failed(assignment.shard.shard_id, "SourceGoneError", "log")
    assert not dispatcher.is_of_use(0)
    attempts = []
    while (assignment := dispatcher.take(1, {1: "here"})) is not None:
        attempts.append(assignment.attempt)
        run.directory.commit_part(
            assignment.shard.shard_id, [outcome_of(ref, assignment.shard.shard_id) for ref in assignment.shard.images]
        )
        dispatcher.done(assignment.shard.shard_id)
    assert dispatcher.is_finished
    assert attempts == [1] * 6, "no image was at fault, so none has to be done with care"


def test_a_worker_whose_processes_die_over_shard_after_shard_gets_no_more_and_each_death_is_told(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run([f"{number}.png" for number in range(6)], per_shard=1)
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None, workers=2)
    get_one_done(dispatcher, 0)
    for _ in range(3):
        assert dispatcher.is_of_use(1)
        assignment = dispatcher.take(1, {1: "here"})
        assert assignment is not None
        dispatcher.died(assignment.shard.shard_id, "SIGILL", "logs/worker-1.log")
        dispatcher.worker_ready(1)
    assert not dispatcher.is_of_use(1)
    told = [record.getMessage() for record in caplog.records]
    assert told[:1] == ["worker 1 died over shard s001 (SIGILL): see logs/worker-1.log"]
    assert told[3:] == ["worker 1 failed 3 times in a row (SIGILL) and gets no more: see logs/worker-1.log"]


def test_deaths_with_a_shard_done_in_between_and_those_of_the_last_worker_are_not_the_workers_fault(
    make_run: MakeRun,
) -> None:
    run = make_run([f"{number}.png" for number in range(20)], per_shard=1)
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None, workers=2)

    def end(number: int, *, dies: bool) -> None:
        assignment = dispatcher.take(number, {number: "here"})
        assert assignment is not None
        if dies:
            dispatcher.died(assignment.shard.shard_id, "SIGKILL", "log")
        else:
            dispatcher.done(assignment.shard.shard_id)

    get_one_done(dispatcher, 0)
    for _ in range(3):
        end(1, dies=True)
        end(1, dies=False)
    assert dispatcher.is_of_use(1)
    for _ in range(3):
        end(1, dies=True)
    assert not dispatcher.is_of_use(1)
    for _ in range(5):
        end(0, dies=True)
    assert dispatcher.is_of_use(0)


def test_a_worker_that_fails_costs_no_shard_its_attempts_while_others_work(run: TinyRun) -> None:
    """One shard is with another worker, and the failing one gets the same again and again."""
    dispatcher = Dispatcher(run.shards[:1], run.context, lambda rows: None, workers=2)
    for _ in range(3):
        dispatcher.take(1, {1: "here"})
        dispatcher.failed("s000", "OSError", "log")
    assert not dispatcher.is_of_use(1)
    dispatcher.take(0, {0: "here"})
    dispatcher.failed("s000", "OSError", "log")
    dispatcher.take(0, {0: "here"})
    dispatcher.failed("s000", "OSError", "log")
    dispatcher.take(0, {0: "here"})
    with pytest.raises(RunError, match="s000 made no headway in 3 attempts"):
        dispatcher.failed("s000", "OSError", "log")


def test_no_worker_of_use_ends_the_run_whichever_way_the_last_one_failed(run: TinyRun) -> None:
    dispatcher = Dispatcher(run.shards[:1], run.context, lambda rows: None, workers=2)
    for _ in range(3):
        dispatcher.take(1, {1: "here"})
        dispatcher.failed("s000", "OSError", "log")
    for _ in range(2):
        dispatcher.start_failed(0, "SIGKILL", "log", others_work=True)
    with pytest.raises(RunError, match="every worker failed 3 times in a row, at last so: SIGKILL"):
        dispatcher.start_failed(0, "SIGKILL", "log", others_work=True)


def test_a_shard_in_between_makes_a_worker_trusted_again(make_run: MakeRun) -> None:
    run = make_run([f"{number}.png" for number in range(6)], per_shard=1)
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None)
    for number in range(6):
        assignment = dispatcher.take(0, {0: "here"})
        assert assignment is not None
        if number == 2:
            dispatcher.done(assignment.shard.shard_id)
        elif number < 5:
            dispatcher.failed(assignment.shard.shard_id, "OSError", "log")
    with pytest.raises(RunError, match="every worker failed 3 times in a row"):
        dispatcher.failed(run.shards[5].shard_id, "OSError", "log")


def test_deaths_without_headway_and_without_a_culprit_end_the_run(run: TinyRun) -> None:
    dispatcher = Dispatcher(run.shards[:1], run.context, lambda rows: None)
    ref = run.shards[0].images[0]
    for number in range(4):
        dispatcher.take(0, {0: "here"})
        if number == 1:
            dispatcher.report("s000", [outcome_of(ref, "s000")])
        if number == 3:
            break
        dispatcher.died("s000", "SIGKILL", "log")
    with pytest.raises(RunError, match="s000 made no headway in 3 attempts"):
        dispatcher.died("s000", "SIGKILL", "log")


def test_an_image_is_reported_once_whoever_does_it_again(run: TinyRun) -> None:
    seen: list[str] = []
    dispatcher = Dispatcher(run.shards[:1], run.context, lambda rows: seen.extend(r.relative_path for r in rows))
    first, second = (outcome_of(ref, "s000") for ref in run.shards[0].images)
    dispatcher.take(0, {0: "here"})
    dispatcher.report("s000", [first])
    dispatcher.died("s000", "SIGKILL", "log")
    dispatcher.take(0, {0: "here"})
    dispatcher.report("s000", [first])
    run.directory.commit_part("s000", [first, second])
    dispatcher.done("s000")
    dispatcher.report("s000", [first, second])  # Ray may deliver an answer after the shard's end
    assert seen == ["a.png", "b.png"]


def test_a_worker_that_gets_images_done_is_not_blamed_for_deaths(make_run: MakeRun) -> None:
    run = make_run([f"{number}.png" for number in range(8)], per_shard=2)
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None, workers=2)
    for _ in range(4):
        assignment = dispatcher.take(1, {1: "here"})
        assert assignment is not None
        shard = assignment.shard
        dispatcher.report(shard.shard_id, [outcome_of(shard.images[0], shard.shard_id)])
        dispatcher.died(shard.shard_id, "SIGKILL", "log")
    assert dispatcher.is_of_use(1)


def test_workers_that_all_die_are_not_blamed_one_after_the_other(make_run: MakeRun) -> None:
    run = make_run([f"{number}.png" for number in range(12)], per_shard=1)
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None, workers=2)
    for number in (0, 1) * 5:
        assignment = dispatcher.take(number, {number: "here"})
        assert assignment is not None
        dispatcher.died(assignment.shard.shard_id, "SIGKILL", "log")
    assert dispatcher.is_of_use(0)
    assert dispatcher.is_of_use(1)


@pytest.mark.parametrize("one_gets_done", [False, True])
def test_where_everything_kills_the_images_of_one_shard_are_settled_before_others(
    make_run: MakeRun, one_gets_done: bool
) -> None:
    """Else every image of a large run would be tried twice before the run breaks off."""
    run = make_run([f"{number}.png" for number in range(12)], per_shard=1)
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None)
    if one_gets_done:
        get_one_done(dispatcher, 0)
    taken = []
    for _ in range(11):
        assignment = dispatcher.take(0, {0: "here"})
        assert assignment is not None
        taken.append(int(assignment.shard.shard_id[1:]))
        Journal(run.directory.journal_dir, assignment.shard.shard_id).begin("an image")
        dispatcher.died(assignment.shard.shard_id, "SIGKILL", "log")
    assert taken == ([*range(1, 12)] if one_gets_done else [*range(8), 7, 7, 7])


def test_a_run_in_which_every_image_is_set_aside_breaks_off(make_run: MakeRun) -> None:
    run = make_run([f"{number}.png" for number in range(9)], per_shard=1)

    def set_aside(dispatcher: Dispatcher, count: int) -> None:
        for _ in range(count):
            assignment = dispatcher.take(0, {0: "here"})
            assert assignment is not None
            shard = assignment.shard
            outcome = replace(outcome_of(shard.images[0], shard.shard_id), status=Status.QUARANTINED)
            dispatcher.report(shard.shard_id, [outcome])

    with pytest.raises(RunError, match="over each of 8 images"):
        set_aside(Dispatcher(run.shards, run.context, lambda rows: None), 8)
    fruitful = Dispatcher(run.shards, run.context, lambda rows: None)
    assignment = fruitful.take(0, {0: "here"})
    assert assignment is not None
    fruitful.report("s000", [outcome_of(assignment.shard.images[0], "s000")])
    set_aside(fruitful, 8)


def test_a_worker_may_start_until_it_has_failed_to(run: TinyRun) -> None:
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None, workers=2)
    assert dispatcher.may_start(0)
    dispatcher.start_failed(0, "exit code 1", "log", others_work=True)
    assert not dispatcher.may_start(0)
    assert dispatcher.may_start(1)


def test_a_shard_of_which_every_image_failed_is_for_another_worker_whose_word_is_final(run: TinyRun) -> None:
    dispatcher = Dispatcher(run.shards[:1], run.context, lambda rows: None, workers=2)
    assert dispatcher.take(1, {0: "here", 1: "here"}) is not None
    dispatcher.doubted("s000")
    assert dispatcher.take(1, {0: "here", 1: "here"}) is None
    assignment = dispatcher.take(0, {0: "here", 1: "here"})
    assert assignment is not None
    assert (assignment.attempt, assignment.doubted_by) == (1, (1, "here"))
    dispatcher.give_back("s000")
    assert dispatcher.take(1, {1: "here"}) is not None, "where no other is ready, it has to look again"


def test_a_shard_over_which_a_worker_died_is_for_another_one_where_there_is_one(run: TinyRun) -> None:
    dispatcher = Dispatcher(run.shards[:1], run.context, lambda rows: None, workers=3)
    crew = {0: "here", 1: "here", 2: None}
    dispatcher.take(0, crew)
    dispatcher.died("s000", "SIGKILL", "log")
    assert dispatcher.take(0, crew) is None
    assert dispatcher.take(1, crew) is None, "another machine soon has a worker"
    assert dispatcher.take(1, {0: "here", 1: "here"}) is not None
    dispatcher.died("s000", "SIGKILL", "log")
    assert dispatcher.take(1, {1: "here"}) is not None, "it is alone"


def test_a_shard_that_is_doubted_is_rather_for_whom_it_killed(run: TinyRun) -> None:
    dispatcher = Dispatcher(run.shards[:1], run.context, lambda rows: None, workers=2)
    crew = {0: "here", 1: "there"}
    dispatcher.take(0, crew)
    dispatcher.doubted("s000")
    dispatcher.take(1, crew)
    dispatcher.died("s000", "SIGKILL", "log")
    assert dispatcher.take(0, crew) is None, "its word would be final, and it is the one that doubted"
    assert dispatcher.take(1, crew) is not None


def test_a_worker_that_cannot_start_ends_no_run_in_which_another_has_worked(run: TinyRun) -> None:
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None, workers=2)
    dispatcher.take(0, {0: "here"})
    dispatcher.report("s000", [outcome_of(run.shards[0].images[0], "s000")])
    dispatcher.died("s000", "SIGKILL", "log")  # and is started anew
    for _ in range(3):
        dispatcher.start_failed(1, "no weights", "log", others_work=False)
    assert not dispatcher.is_of_use(1)
    for _ in range(2):
        dispatcher.start_failed(0, "no weights", "log", others_work=False)
    with pytest.raises(RunError, match="3 workers in a row ended"):
        dispatcher.start_failed(0, "no weights", "log", others_work=False)


def test_the_first_failure_of_a_worker_to_start_is_told(run: TinyRun, caplog: pytest.LogCaptureFixture) -> None:
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None, workers=2)
    for _ in range(2):
        dispatcher.start_failed(1, "all machines of a run need the same OUT", "worker-1.log", others_work=True)
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == "worker 1 ended before it was ready (all machines of a run need the same OUT): see worker-1.log"


def test_what_a_worker_doubts_is_not_for_those_of_its_machine(run: TinyRun) -> None:
    dispatcher = Dispatcher(run.shards[:1], run.context, lambda rows: None, workers=3)
    crew = {0: "there", 1: "here", 2: "here"}
    dispatcher.take(1, crew)
    dispatcher.doubted("s000")
    assert dispatcher.take(2, crew) is None
    assert dispatcher.take(0, crew) is not None


@pytest.mark.parametrize("others_succeed", [True, False])
def test_a_worker_that_is_alone_with_its_failures_gets_no_more(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture, others_succeed: bool
) -> None:
    run = make_run([f"{number}.png" for number in range(6)], per_shard=1)
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None, workers=2)
    status = Status.RESTORED if others_succeed else Status.FAILED
    for _ in range(5):
        assignment = dispatcher.take(1, {0: "here", 1: "here"})
        assert assignment is not None
        dispatcher.doubted(assignment.shard.shard_id)
    while (assignment := dispatcher.take(0, {0: "here", 1: "here"})) is not None:
        shard = assignment.shard
        dispatcher.report(shard.shard_id, [replace(outcome_of(shard.images[0], shard.shard_id), status=status)])
        dispatcher.done(shard.shard_id)
    assert dispatcher.is_finished
    assert dispatcher.is_of_use(1) != others_succeed
    told = [record.getMessage() for record in caplog.records if "gets no more" in record.getMessage()]
    assert len(told) == others_succeed, "once"
