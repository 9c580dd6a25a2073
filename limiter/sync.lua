-- sync: say what this process holds, wants and has finished; get permits and jobs, or why not and when
-- to ask again. Acquire, release, renew, feedback, claim and finish are this one decision.
--
-- KEYS      as in gate.lua
-- ARGV[3]   seq        number of this call; the same number gets the same answer, a lower one '-1'; one that is
--                      not the next: the gate was set back to an older state, see `leave_behind`
-- ARGV[4]   held       slots this process holds now, absolute: permits and running jobs
-- ARGV[5]   permits    permits it has waiters for
-- ARGV[6]   jobs       jobs it has room for
-- ARGV[7]   birth      birth of the gate it remembers, us; 0 = none
-- ARGV[8]   started    when this process first called, us; 0 = this is its first call
-- ARGV[9]   limits     'max min initial rate window lease backoff threshold factor additive even', times in
--                      us; rate 0 = none; '' = keep what the gate has
-- ARGV[10]  override   the operator's values it remembers
-- ARGV[11]  successes  since its last call, of runs admitted under ARGV[12], the cut it knows
-- ARGV[13]  refused    highest attempt that was refused with a rate limit since its last call; 0 = none
-- ARGV[14]  pause      us for which the refused ask the fleet to pause
-- ARGV[15]  returned   'stamp count stamp count': grants that were not used; 'late' in front if the call
--                      took longer than the slack
-- ARGV[16]  leave      1 = this process goes; it holds nothing any more
-- ARGV[17]  reset      1 = the level goes back to its initial value; no start and no slot is forgotten
-- ARGV[18]  stand      1 = keep my place in line: somebody waits here for this gate and another at once
-- ARGV[19]  last grant highest attempt that a wake message granted and the process has taken over; 0 = none
-- ARGV[20]  flows      how many names of flows follow; then per entry: id, attempt, flow's number, what, arg
--                      what = completed|failed|aborted|quarantined|lost (arg = outcome; with 'blob:' in
--                      front it stands under blob:<b>:<i>:<attempt>; where that is lost, the run goes back to
--                      its place) | result:<ms> (arg = arq's record)
--                      | save (arg = checkpoint of a run that goes on, or is refused or handed back next)
--                      | save-beside (arg = key where it was stored, because it is too large for a call)
--                      | refuse (arg = delay us) | wait (arg = delay us; granted, cannot start here yet)
--                      | back (granted, never started) | hand (handed back)
--                      | died (a process of its own died under it) | keep (still running; after status 1)
--
-- Returns {header, override, ids refused, then per job: id, attempt, deaths, refused, backs, saved, payload}
--   saved = its checkpoint, or 'beside' where it stands under kept:<b>:<i>
--   header 'status permits wait now birth started cut level in_use used stamp slack lease reason attempt
--   together stands',
--   and then, only if there is one, a note: !newer=<limits> or !older=<limits> (another living process
--   brought these; the newer are in force) or !repaired=<fields> (they were poisoned); ',' for ' '
--   status 0 = ok, 1 = you were unknown, or the gate was set back: nothing admitted, send your claims again
--   with 'keep'
--   together, stands: see together.lua; 0 in a call to this gate alone
--   reason '-' | level | window | pacing | pause | cold | turn | jobs     why less than wanted was given
-- A refusal burns no start and takes no slot; it may take a ticket.
-- Cost: O(entries + jobs + log(processes) + log(queue)); nothing grows with workers or queue length.
--
-- The steps are in meet.lua (meet, join), reap.lua, settle.lua, level.lua, window.lua, claim.lua, admit.lua and
-- wake.lua; what the operator says is in override.lua, what mends a poisoned state in heal.lua, what is told in
-- trail.lua. What few calls need is a function that makes it, since each call makes all its functions anew.

if record and call.seq < record.seq then return { '-1' } end
if state.poisoned then gate.note = 'repaired=' .. healer().heal(state, now, call.birth) end
extend_after_stall(state, now)
if record and call.seq == record.seq then return answer_again() end
if not meet_gate() then return redis.error_reply('NOLIMITS this limit has no values yet') end

reap()
join()
settle()
roll_window()
take(places())
queue_up()
wake()
return reply()
