-- override: the operator's word on a limit, and the values in force under it. Part of sync.lua and control.lua.
--
-- The word is twelve words of text, '-' = nothing said. Only the first four count for admission:
--   max rate pause_until at   rate 0 = none; pause_until us, FOREVER = until resumed; at = when it was said, us
--   request                   id of the command that said it: the same command again changes nothing
--   set_at set_by old_max old_rate level   who set max and rate, what was in force before; the level then, or
--                             'top' where it was at its ceiling
--   paused_at paused_by       who paused
-- The key keeps it without lifetime while something in it lasts; a word that has ended is kept for a week
-- beyond that, so that no process which slept through its end brings it back. Of two words the later holds.

local FOREVER = PARKED

-- What few calls need; made by those that do.
local function rules()
  local rule = {}

  function rule.number_in(word, low, high)
    local number = tonumber(word)
    return number and number >= low and number <= high and number or nil
  end

  -- What counts of a word, nil where nothing is said; nil for a text that is none.
  function rule.read_override(text)
    local max, rate, pause, at, rest = string.match(text, '^(%S+) (%S+) (%S+) (%d+) (.+)$')
    if not max then return nil end
    local word = { at = tonumber(at), rest = rest, max = rule.number_in(max, 1, 1000000),
      rate = rule.number_in(rate, 0, 1000000), pause = rule.number_in(pause, 0, FOREVER) }
    local sound = (max == '-' or word.max) and (rate == '-' or word.rate) and (pause == '-' or word.pause)
    return sound and word or nil
  end

  function rule.keep_override(text, now)
    local word = rule.read_override(text)
    redis.call('SET', OVERRIDE, text)
    if word.max or word.rate or word.pause == FOREVER then return end
    redis.call('PEXPIRE', OVERRIDE, math.ceil(math.max(0, (word.pause or now) - now) / 1000) + WEEK)
  end

  -- Limits as they are brought, into the state; false for a text that is none.
  function rule.put_limits(state, text)
    local v = {}
    for word in string.gmatch(text, '%S+') do
      v[#v + 1] = rule.number_in(word, 0, 1e18)
    end
    if #v < 10 then return false end
    state.max, state.min, state.initial, state.rate, state.window, state.lease = v[1], v[2], v[3], v[4], v[5], v[6]
    state.backoff, state.threshold, state.factor, state.additive = v[7], v[8], v[9], v[10]
    state.even = v[11] or 0
    state.config = text
    return true
  end

  function rule.initial_level(state, ceiling)
    if state.initial >= state.max then return ceiling end -- a level that begins at its ceiling follows it
    return math.max(math.min(state.min, ceiling), math.min(state.initial, ceiling))
  end

  -- The level goes back to where it began; no start and no slot is forgotten. What was refused
  -- is: additive growth is steep until it is refused again.
  function rule.reset_level(state, now, why, who)
    local before = state.level
    state.level = rule.initial_level(state, state.ceiling)
    state.oks, state.told = 0, now
    state.bound, state.rounds, state.streak, state.halt = 0, 0, 0, 0
    redis.call('HSET', GATE, 'told_level', exact(state.level))
    if why ~= 'idle' or before ~= state.level then
      event(now, 'reset', why, exact(before), exact(state.level), who)
    end
  end

  return rule
end

-- The limits in force: of the process that started last, under the operator's word.
local function effective(state, now)
  if state.override == '' then return state.max, state.rate, 0 end
  local word = rules().read_override(state.override)
  if not word then
    event(now, 'repaired', 'poisoned', 'override', '', 'gate')
    state.override = ''
    redis.call('DEL', OVERRIDE)
    return state.max, state.rate, 0
  end
  return word.max or state.max, word.rate or state.rate, word.pause or 0
end

-- A level at its ceiling follows the ceiling; a level below it stays.
local function bound_level(state, ceiling)
  if state.level == 0 then state.level = rules().initial_level(state, ceiling) end
  if state.ceiling > 0 and state.level >= state.ceiling then state.level = ceiling end
  state.level = math.max(math.min(state.min, ceiling), math.min(state.level, ceiling))
  state.ceiling = ceiling
end
