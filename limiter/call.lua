-- call: the call of `sync` as read from ARGV, the gate it meets, and the dead it finds. Part of sync.lua.

local me = ARGV[1]
local call = {
  seq = tonumber(ARGV[3]), held = tonumber(ARGV[4]), permits = tonumber(ARGV[5]), jobs = tonumber(ARGV[6]),
  birth = tonumber(ARGV[7]), started = tonumber(ARGV[8]), limits = ARGV[9], override = ARGV[10],
  successes = tonumber(ARGV[11]), counted_under = tonumber(ARGV[12]), refused = tonumber(ARGV[13]),
  pause = tonumber(ARGV[14]), returned = ARGV[15], leave = ARGV[16] == '1', reset = ARGV[17] == '1',
  stand = ARGV[18] == '1', last_grant = tonumber(ARGV[19]), flows = {},
}
local flow_count = tonumber(ARGV[20])
for i = 1, flow_count do call.flows[i] = ARGV[20 + i] end
local FIRST_ENTRY = 21 + flow_count

local state, record = load(me)
local now = clock(state)
-- What this call finds and decides: limits in force, places free, who is told. With other gates of the
-- same call (together.lua): permits given by all of them, whether more are waited for here, and for how
-- many us a place is kept free for them. `kept`: places kept free, not to be given in this call.
local gate = { several = false, together = 0, stands = false, keep_us = 0, kept = 0, refusals = 0 }
local returned_flows = {} -- flows some of whose jobs came back to the queue in this call
local delayed = {} -- flow -> earliest due time of the runs refused in this call

local function chunks(list, size, act)
  for from = 1, #list, size do
    act(unpack(list, from, math.min(from + size - 1, #list)))
  end
end

-- Another value than the one in force: told once in the trail, and to each process that brings it.
local function two_values(newer)
  if state.config == '' then return end
  local known = redis.call('HGET', GATE, 'rivals') or ''
  if newer then
    event(now, 'values', 'a process that started later brings others', state.config, call.limits, me)
    redis.call('HSET', GATE, 'rivals', state.config)
    local others = redis.call('ZCARD', LEASES) - (record and 1 or 0)
    if others > 0 then gate.note = 'older=' .. state.config end
  else
    if #known < 1000 and not string.find(known, call.limits, 1, true) then
      event(now, 'values', 'a process that started earlier still has others', call.limits, state.config, me)
      redis.call('HSET', GATE, 'rivals', known .. ';' .. call.limits)
    end
    gate.note = 'newer=' .. state.config
  end
end

-- The limits of the process that started last.
local function take_limits()
  if call.limits == '' then return end
  local newer = call.started > state.config_from
  if call.limits ~= state.config then two_values(newer) end
  if not newer then return end
  rules().put_limits(state, call.limits)
  state.config_from = call.started
  state.reap_at = 0
end

local function create_gate()
  for _, key in ipairs({ GATE, LEASES, TICKETS }) do redis.call('DEL', key) end -- what an older one left
  record, state.was_woken, state.was_override, state.was_config = nil, '', '', ''
  state.gen, state.attempt, state.place = now, math.max(now, state.attempt), math.max(1, state.place)
  state.override = redis.call('GET', OVERRIDE) or ''
  state.due = earliest_due()
  redis.call('DEL', FLOWS)
end

-- After a data loss the newest word that a process remembers holds again.
local function remember_override()
  if call.override == state.override then return end
  local rule = rules()
  local theirs, ours = rule.read_override(call.override), rule.read_override(state.override)
  if not theirs or ours and ours.at >= theirs.at then return end
  state.override = call.override
  rule.keep_override(state.override, now)
  event(now, 'override', 'remembered by a process after a data loss', '', '', me)
end

local function expire(key) redis.call('PEXPIRE', key, lifetime_ms(state)) end

-- Claims that no living record owns go back to their places (a gate that is new, a flow first served).
local function sweep(flow)
  local ids = redis.call('ZRANGEBYSCORE', queue_of(flow), whole(PARKED + 1), '+inf')
  for _, id in ipairs(ids) do
    local job = read_job(redis.call('HGET', JOBS, id))
    redis.call('ZADD', queue_of(flow), whole(job and job.place or state.place), id)
    redis.call('DEL', 'arq:in-progress:' .. id)
  end
end

-- The gate as it is for this call; false if nobody has given it values yet.
local function meet_gate()
  local was_cold = state.cold
  if state.gen == 0 then create_gate() end
  -- a birth that is later is of a gate whose clock ran ahead; 1 is that of a gate that had to be healed
  if call.birth > 0 and call.birth ~= state.gen and state.gen > 1 then state.cold = 1 end
  if call.started == 0 then call.started = now end
  if call.override ~= '' then remember_override() end
  take_limits()
  if state.lease == 0 then return false end
  gate.max, gate.rate, gate.held_until = effective(state, now)
  bound_level(state, gate.max)
  gate.opens = 0
  if state.cold == 1 then
    gate.opens = state.gen + math.max(state.lease, gate.rate > 0 and state.window or 0)
    if now >= gate.opens then
      state.cold = 0
    elseif was_cold == 0 then
      event(now, 'cold', 'the gate is new and its callers remember an older one', '0',
        exact((gate.opens - now) / 1000000), me)
    end
  end
  return true
end

-- The jobs of a process that is gone go back to their own places, with one death more each if it died.
local function return_jobs(number, died)
  for _, flow in ipairs(redis.call('SMEMBERS', FLOWS)) do
    local queue, parked = queue_of(flow), whole(PARKED + number)
    local ids = redis.call('ZRANGEBYSCORE', queue, parked, parked)
    for _, id in ipairs(ids) do
      local job = read_job(redis.call('HGET', JOBS, id))
      if job then
        job.deaths = job.deaths + died
        redis.call('HSET', JOBS, id, write_job(job))
      end
      redis.call('ZADD', queue, whole(job and job.place or state.place), id)
      redis.call('DEL', 'arq:in-progress:' .. id)
      returned_flows[flow] = true
    end
  end
end

-- It holds nothing and waits for nothing any more; its claims stay where they are.
local function strike_out(process, its)
  if its then
    state.in_use = math.max(0, state.in_use - its.held)
    state.active = math.max(0, state.active - is_active(its))
    state.callers = math.max(0, state.callers - calls(its.kind))
    if state.kept_for == its.number then state.kept_for = 0 end
  end
  if redis.call('ZREM', TICKETS, process) == 1 then state.waiting = state.waiting - 1 end
  for _, flow in ipairs(redis.call('SMEMBERS', FLOWS)) do redis.call('ZREM', idle_of(flow), process) end
  redis.call('ZREM', LEASES, process)
  redis.call('HDEL', GATE, 'p:' .. process, 'a:' .. process)
end

local function bury(process)
  local dead = read_record(redis.call('HGET', GATE, 'p:' .. process))
  if not dead then
    local healing = healer()
    healing.count_anew(state)
    for _, flow in ipairs(healing.free_orphans(state)) do returned_flows[flow] = true end
  elseif dead.seq == 0 then -- nobody died under what was left behind
    return_jobs(dead.number, 0)
  else
    event(now, 'reaped', 'its lease ended', exact(dead.held), '0', process)
    return_jobs(dead.number, 1)
  end
  strike_out(process, dead)
end

-- Whoever calls reaps the dead: slots and claims together, never one without the other.
local function reap()
  if now <= state.reap_at then return end
  local rows = redis.call('ZRANGE', LEASES, 0, 63, 'WITHSCORES')
  state.reap_at = now + state.lease
  for i = 1, #rows, 2 do
    local ends = tonumber(rows[i + 1])
    if ends >= now then
      state.reap_at = math.min(state.reap_at, ends)
      return
    elseif rows[i] ~= me then
      bury(rows[i])
    end
  end
  if #rows == 128 then state.reap_at = now end
end

-- A call that is not the one after its last: the gate was set back to an older state, as by a failover, and does not
-- know what the process began and ended since. It counts as unknown, so it says again what it runs. What else
-- stands as claimed by it is left behind, under a record that nobody renews.
local function leave_behind()
  if not record or call.leave or call.seq <= record.seq + 1 then return end
  event(now, 'behind', 'the gate was set back', whole(call.seq - 1), whole(record.seq), me)
  strike_out(me, record)
  local rest = me .. '~' .. whole(record.number)
  record.held, record.seq, record.kind, record.idle, record.pushed = 0, 0, '-', false, ''
  record.ends = now + state.lease
  redis.call('HSET', GATE, 'p:' .. rest, write_record(record))
  redis.call('ZADD', LEASES, whole(record.ends), rest)
  record, state.reap_at = nil, 0
  state.attempt = math.max(state.attempt, now) -- numbers that were given since are not given again
end

-- A process that finds itself unknown though it holds something is admitted nothing in this call.
local function join()
  leave_behind()
  gate.unknown = not record and call.seq > 1 and call.held > 0
  if gate.unknown then call.permits, call.jobs = 0, 0 end
  if not record then
    -- what it gives back may be given back already, by this call, whose answer got lost, while it was known
    call.returned, call.successes = '', 0
    state.processes = state.processes + 1
    record = {
      number = state.processes, held = 0, seq = 0, kind = '-', idle = false, flows = 0, ends = 0, want = 0, since = now,
      pushed = '',
    }
    state.touched = 0
  end
  if record.flows ~= flow_count then
    for _, flow in ipairs(call.flows) do
      if redis.call('SADD', FLOWS, flow) == 1 then sweep(flow) end
    end
    record.flows = flow_count
    state.flows = redis.call('SCARD', FLOWS)
    state.touched = 0
  end
  record.extended = false
  gate.parked = whole(PARKED + record.number)
  state.active = state.active - is_active(record)
end
